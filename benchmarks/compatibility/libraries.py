"""Prefix tuning by this package, by PEFT and by AdapterHub's ``adapters``, asked for in the same words.

Each library is used as its documentation says. What it has no setting for raises ``NotImplementedError`` with the
settings that it has.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# The prefix length.
P = 3
# The tasks of a row: one, or several whose prefixes it sees one after another.
Tasks = Sequence[int]


def only(config_class: type, *names: str) -> NotImplementedError:
    """Says what settings there are, or of which type those with ``names`` are."""
    types = {field.name: getattr(field.type, "__name__", field.type) for field in dataclasses.fields(config_class)}
    has = [f"{name}: {types[name]}" for name in names] or types
    return NotImplementedError(f"{config_class.__name__} has {', '.join(has)}")


def with_lora_layers(base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    """``base`` with PEFT's LoRA at the projections of its queries."""
    import peft

    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "query"], r=2, **settings), base)


class Ours:
    name = package = "prefix_kernels"
    base_settings: dict[str, object] = {}
    task_names = ("default", "second")

    def attach(self, base: PreTrainedModel, **settings: object) -> nn.Module:
        from prefix_kernels.integrations.transformers import PrefixTuningConfig, get_prefix_model

        return get_prefix_model(base, PrefixTuningConfig(**({"num_virtual_tokens": P} | settings)))

    def prefixes(self, model: nn.Module) -> list[Tensor]:
        return [p for n, p in model.named_parameters() if "prefix_encoder" in n]

    def with_mlp(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, prefix_projection=True)

    def with_dropout(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, prefix_dropout=0.5)

    def in_one_layer(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, layers=[1])

    def of_uneven_lengths(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, num_virtual_tokens=[2, 4], position_offset="none")

    def at_every_position(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, position_offset="none")

    def with_first_token_frozen(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, num_frozen_tokens=1)

    def from_text(self, base: PreTrainedModel, text: Tensor) -> nn.Module:
        from prefix_kernels.integrations.transformers import initialize_from_text

        model = self.attach(base)
        initialize_from_text(model, text)
        return model

    def with_lora(self, base: PreTrainedModel, **settings: object) -> nn.Module:
        return self.attach(with_lora_layers(base, **settings))

    def two_tasks(self, base: PreTrainedModel) -> nn.Module:
        from prefix_kernels.integrations.transformers import load_named_prefix, save_prefix_model

        model = self.attach(base).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_prefix_model(model, f"{folder}/task.safetensors")
            with torch.no_grad():
                for prefix in self.prefixes(model):
                    prefix.normal_()
            load_named_prefix(model, "second", f"{folder}/task.safetensors")
        return model

    def switch(self, model: nn.Module, task: int) -> None:
        from prefix_kernels.integrations.transformers import set_prefix

        set_prefix(model, self.task_names[task])

    def for_each_row(self, model: nn.Module, rows: Sequence[Tasks]) -> dict[str, object]:
        """Prepares ``model`` for a batch, and returns the arguments for its call."""
        return {"prefix_names": [[self.task_names[task] for task in tasks] for tasks in rows]}

    def both_tasks(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Logits of ``ids``, all of whose rows see the prefixes of both tasks."""
        return model(ids, **self.for_each_row(model, [(0, 1)] * len(ids))).logits

    def plain_torch(self, model: nn.Module) -> nn.Module:
        from prefix_kernels import replace_multihead_attention

        replace_multihead_attention(model, num_prefix_tokens=P)
        return model


class Peft:
    name = package = "peft"
    base_settings: dict[str, object] = {}
    task_names = ("default", "second")

    def config(self, base: nn.Module, kind: str = "PrefixTuningConfig", **settings: object) -> object:
        import peft

        if isinstance(base, nn.TransformerEncoder):
            task, sizes = "FEATURE_EXTRACTION", {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
            sizes["num_transformer_submodules"] = 1
        else:
            task, sizes = self.task_type(base), self.sizes(base)
        return getattr(peft, kind)(**({"task_type": task, "num_virtual_tokens": P} | sizes | settings))

    def task_type(self, base: PreTrainedModel) -> str:
        """The one that its documentation has for such a model; that of any model, where it has none."""
        if base.config.is_encoder_decoder:
            return "SEQ_2_SEQ_LM"
        if type(base).__name__.endswith("ForSequenceClassification"):
            return "SEQ_CLS"
        return "CAUSAL_LM" if base.can_generate() else "FEATURE_EXTRACTION"

    def sizes(self, base: PreTrainedModel) -> dict[str, int]:
        """Those that it would not find in the model's config, or would find wrong."""
        if base.config.model_type in ("distilbert", "clip"):
            towers = 2 if base.config.model_type == "clip" else 1
            return {"token_dim": 32, "num_layers": 2 * towers, "num_attention_heads": 4}
        return {"num_layers": base.config.num_decoder_layers} if base.config.model_type == "t5" else {}

    def attach(self, base: PreTrainedModel, **settings: object) -> nn.Module:
        import peft

        return self.prepared(peft.get_peft_model(base, self.config(base, **settings)))

    def prepared(self, model: nn.Module) -> nn.Module:
        return model

    def base_of(self, model: nn.Module) -> PreTrainedModel:
        return model.get_base_model()

    def prefixes(self, model: nn.Module) -> list[Tensor]:
        return [p for n, p in model.named_parameters() if "prompt_encoder" in n and p.requires_grad]

    def with_mlp(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, prefix_projection=True, encoder_hidden_size=16)

    def with_dropout(self, base: PreTrainedModel) -> nn.Module:
        import peft

        raise only(peft.PrefixTuningConfig)

    def in_one_layer(self, base: PreTrainedModel) -> nn.Module:
        """A prefix by the setting that comes closest; it would choose the lowest layer."""
        return self.attach(base, num_layers=1)

    def of_uneven_lengths(self, base: PreTrainedModel) -> nn.Module:
        import peft

        raise only(peft.PrefixTuningConfig, "num_virtual_tokens")

    at_every_position = attach

    def with_first_token_frozen(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, kind="CartridgeConfig", num_frozen_tokens=1)

    def from_text(self, base: PreTrainedModel, text: Tensor) -> nn.Module:
        from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

        past = base(text, use_cache=True).past_key_values
        model = self.attach(base, kind="CartridgeConfig")
        initialize_kv_prefix_from_past_key_values(model, past_key_values=past, num_virtual_tokens=P)
        return model

    def with_lora(self, base: PreTrainedModel, **settings: object) -> nn.Module:
        """``PeftMixedModel`` and ``add_adapter`` refuse the two together; the layers alone can be put in before."""
        model = self.attach(with_lora_layers(base, **settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
        return model

    def two_tasks(self, base: PreTrainedModel) -> nn.Module:
        model = self.attach(base, kind="CartridgeConfig")
        model.add_adapter("second", self.config(base, kind="CartridgeConfig"))
        return model.eval()

    def switch(self, model: nn.Module, task: int) -> None:
        model.set_adapter(self.task_names[task])

    def for_each_row(self, model: nn.Module, rows: Sequence[Tasks]) -> dict[str, object]:
        names = [[self.task_names[task] for task in tasks] for tasks in rows]
        return {"adapter_names": [several[0] if len(several) == 1 else several for several in names]}

    def both_tasks(self, model: nn.Module, ids: Tensor) -> Tensor:
        import peft
        from peft.tuners.cartridge.utils import compose_cartridge_adapters

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            compose_cartridge_adapters([folder, f"{folder}/second"], output_path=f"{folder}/both")
            both = self.prepared(peft.PeftModel.from_pretrained(self.base_of(model), f"{folder}/both"))
            return both.eval()(ids).logits

    def plain_torch(self, model: nn.Module) -> nn.Module:
        return self.attach(model)


class AcceleratedPeft(Peft):
    """A model of PEFT's, on the kernels of this package by its one line."""

    name = "accelerated_peft"

    def prepared(self, model: nn.Module) -> nn.Module:
        from prefix_kernels.integrations.peft import accelerate

        return accelerate(model)

    def base_of(self, model: nn.Module) -> PreTrainedModel:
        from prefix_kernels.integrations.peft import restore

        return restore(model).get_base_model()


class Adapters:
    name = package = "adapters"
    # With SDPA, the default, its decoders hide the last P keys of the sequence from each query where nothing is padded.
    base_settings: dict[str, object] = {"attn_implementation": "eager"}
    task_names = ("task", "second")

    def config(self, **settings: object) -> object:
        import adapters

        return adapters.PrefixTuningConfig(**({"flat": True, "prefix_length": P} | settings))

    def attach(self, base: PreTrainedModel, **settings: object) -> nn.Module:
        import adapters

        adapters.init(base)
        base.add_adapter("task", config=self.config(**settings))
        base.train_adapter("task")
        return base

    def prefixes(self, model: nn.Module) -> list[Tensor]:
        return [p for n, p in model.named_parameters() if "prefix_tuning" in n]

    def with_mlp(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, flat=False)

    def with_dropout(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, dropout=0.5)

    def in_one_layer(self, base: PreTrainedModel) -> nn.Module:
        return self.attach(base, leave_out=[0])

    def of_uneven_lengths(self, base: PreTrainedModel) -> nn.Module:
        import adapters

        adapters.init(base)
        base.add_adapter("lower", config=self.config(leave_out=[1], prefix_length=2))
        base.add_adapter("upper", config=self.config(leave_out=[0], prefix_length=4))
        base.train_adapter(adapters.composition.Stack("lower", "upper"))
        return base

    at_every_position = attach

    def with_first_token_frozen(self, base: PreTrainedModel) -> nn.Module:
        import adapters

        raise only(adapters.PrefixTuningConfig)

    def from_text(self, base: PreTrainedModel, text: Tensor) -> nn.Module:
        import adapters

        raise only(adapters.PrefixTuningConfig)

    def with_lora(self, base: PreTrainedModel, **settings: object) -> nn.Module:
        import adapters

        adapters.init(base)
        base.add_adapter("task", config=adapters.ConfigUnion(self.config(), adapters.LoRAConfig(r=2, **settings)))
        base.train_adapter("task")
        return base

    def two_tasks(self, base: PreTrainedModel) -> nn.Module:
        model = self.attach(base).eval()
        model.add_adapter("second", config=self.config())
        return model

    def switch(self, model: nn.Module, task: int) -> None:
        model.set_active_adapters(self.task_names[task])

    def for_each_row(self, model: nn.Module, rows: Sequence[Tasks]) -> dict[str, object]:
        from adapters.composition import BatchSplit, Stack

        setups = [Stack(*(self.task_names[task] for task in tasks)) for tasks in rows]
        model.active_adapters = BatchSplit(*setups, batch_sizes=[1] * len(rows)) if len(rows) > 1 else setups[0]
        return {}

    def both_tasks(self, model: nn.Module, ids: Tensor) -> Tensor:
        from adapters.composition import Stack

        model.active_adapters = Stack(*self.task_names)
        return model(ids).logits

    def plain_torch(self, model: nn.Module) -> nn.Module:
        import adapters

        adapters.init(model)
        return model


Library = Ours | Peft | Adapters
LIBRARIES: dict[str, Library] = {each.name: each for each in (Ours(), AcceleratedPeft(), Peft(), Adapters())}
