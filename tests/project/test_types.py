"""The types that the package declares, as far as mypy does not see by itself that they are right."""

from __future__ import annotations

import ast
import inspect

from prefix_kernels import functional


def test_the_overloads_of_prefix_attention_have_its_arguments_and_defaults():
    definitions = [
        node
        for node in ast.parse(inspect.getsource(functional)).body
        if isinstance(node, ast.FunctionDef) and node.name == "prefix_attention"
    ]
    for definition in definitions:
        options = definition.args.kwonlyargs
        i = [option.arg for option in options].index("return_lse")
        # The overloads differ in this one.
        options[i].annotation = definition.args.kw_defaults[i] = None
    *overloads, function = [ast.unparse(definition.args) for definition in definitions]
    assert overloads == [function] * 3
