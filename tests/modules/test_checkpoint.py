"""A task is the prefix and its heads: marked trainable, stored in one small file, loaded into a fresh model."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prefix_kernels.checkpoint
from prefix_kernels.checkpoint import (
    load_prefix,
    mark_only_prefix_as_trainable,
    prefix_state_dict,
    read_prefix_metadata,
    save_prefix,
)
from prefix_kernels.functional import prefix_attention
from prefix_kernels.nn.encoder import PrefixEncoder
from prefix_kernels.nn.prefix_tuning_attention import PrefixMultiheadAttention, PrefixTuningAttention

EMBED, HEADS, P, LAYERS, LENGTH = 8, 2, 3, 2, 5


class WithEncoder(nn.Module):
    """A model whose prefixes come from a PrefixEncoder, with a head that has buffers."""

    def __init__(self, projection: bool = False, num_prefix_tokens: int = P) -> None:
        super().__init__()
        head_dim = EMBED // HEADS
        self.backbone = nn.ModuleList(nn.Linear(EMBED, 3 * EMBED) for _ in range(LAYERS))
        options = {"hidden_size": 64} if projection else {}
        self.prefix = PrefixEncoder(num_prefix_tokens, LAYERS, HEADS, head_dim, projection=projection, **options)
        self.heads = nn.ModuleDict({"classifier": nn.Sequential(nn.BatchNorm1d(EMBED), nn.Linear(EMBED, 2))})

    def forward(self, x: Tensor) -> Tensor:
        for linear, pair in zip(self.backbone, self.prefix(), strict=True):
            q, k, v = linear(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + prefix_attention(q, k, v, *pair).transpose(1, 2).flatten(2)
        return self.heads["classifier"](x.mean(1))


class WithAttention(nn.Module):
    """A model of attention modules that hold their own prefixes."""

    def __init__(self, num_prefix_tokens: int = P) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        for layer in self.encoder.layers:
            layer.self_attn = PrefixMultiheadAttention.from_multihead_attention(layer.self_attn, num_prefix_tokens)
        self.textbook = PrefixTuningAttention(EMBED, HEADS, num_prefix_tokens, batch_first=True)
        self.classifier = nn.Linear(EMBED, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.textbook(self.encoder(x)).mean(1))


ATTENTION_PREFIXES = [
    "encoder.layers.0.self_attn.prefix_key",
    "encoder.layers.0.self_attn.prefix_value",
    "encoder.layers.1.self_attn.prefix_key",
    "encoder.layers.1.self_attn.prefix_value",
    "textbook.prefix",
]
CLASSIFIER = ["classifier.bias", "classifier.weight"]
MODELS = pytest.mark.parametrize(
    "make_model",
    [WithAttention, WithEncoder, lambda: WithEncoder(projection=True)],
    ids=["attention", "encoder", "encoder with projection"],
)


def train(model: nn.Module) -> None:
    """A few steps on random data, so that everything trainable (and every buffer of a head) moves."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, LENGTH, EMBED)).square().sum().backward()
        optimizer.step()


def trainable(model: nn.Module) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def output_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model.eval()(torch.randn(6, LENGTH, EMBED, generator=generator))


# Marking.


def test_marking_leaves_only_the_prefixes_trainable():
    model = WithAttention()
    model.requires_grad_(True)
    assert mark_only_prefix_as_trainable(model) == ATTENTION_PREFIXES
    assert trainable(model) == ATTENTION_PREFIXES


def test_marking_with_heads_trains_them_too():
    model = WithAttention()
    names = mark_only_prefix_as_trainable(model, also_train=("classifier",))
    assert sorted(names) == trainable(model) == CLASSIFIER + ATTENTION_PREFIXES


def test_a_head_is_found_by_the_end_of_its_qualified_name():
    model = WithEncoder()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    assert {name.rsplit(".", 1)[0] for name in trainable(model)} == {
        "prefix",
        "heads.classifier.0",
        "heads.classifier.1",
    }
    with pytest.raises(ValueError, match="also_train: expected the name of a module of WithEncoder, got 'fier'"):
        mark_only_prefix_as_trainable(model, also_train=("fier",))


def test_marking_again_forgets_the_heads_of_before():
    model = WithAttention()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    mark_only_prefix_as_trainable(model)
    assert trainable(model) == sorted(prefix_state_dict(model)) == ATTENTION_PREFIXES


def test_marking_refuses_a_model_without_a_prefix_and_changes_nothing():
    for model in (nn.Linear(2, 2), PrefixMultiheadAttention(4, 2)):
        before = trainable(model)
        with pytest.raises(ValueError, match=f"expected a module that holds a prefix.*{type(model).__name__}"):
            mark_only_prefix_as_trainable(model)
        assert trainable(model) == before


def test_marking_refuses_a_string_of_heads():
    with pytest.raises(TypeError, match="also_train: expected a sequence of module names, got the string 'classifier'"):
        mark_only_prefix_as_trainable(WithAttention(), also_train="classifier")


def test_marking_warns_of_a_head_that_shares_its_weight_with_the_frozen_model():
    model = WithAttention()
    model.embedding = nn.Embedding(2, EMBED)
    model.classifier.weight = model.embedding.weight
    with pytest.warns(UserWarning, match=r"classifier shares a parameter with embedding\.weight"):
        mark_only_prefix_as_trainable(model, also_train=("classifier",))


@MODELS
def test_training_moves_the_task_and_nothing_else(make_model):
    model = make_model()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    before = copy.deepcopy(model.state_dict())
    train(model)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == prefix_state_dict(model).keys()


# Storing and loading.


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("heads", [(), ("classifier",)])
@MODELS
def test_a_task_loads_into_a_fresh_copy_of_the_model_from_one_file(make_model, heads, fold, tmp_path):
    base = make_model()
    model = copy.deepcopy(base)
    mark_only_prefix_as_trainable(model, also_train=heads)
    train(model)
    save_prefix(model, tmp_path / "task.safetensors", fold=fold)
    assert [file.name for file in tmp_path.iterdir()] == ["task.safetensors"]

    assert not torch.equal(output_of(base), output_of(model))
    load_prefix(base, tmp_path / "task.safetensors")
    if heads:
        assert torch.equal(output_of(base), output_of(model))
    for name, tensor in prefix_state_dict(model, fold=fold).items():
        assert torch.equal(base.state_dict()[name], tensor)
    # What was loaded is known as the task: it would be stored again.
    assert prefix_state_dict(base).keys() == prefix_state_dict(model, fold=fold).keys()


def test_a_state_dict_holds_detached_views_of_the_task_alone_under_the_names_of_the_model():
    model = WithAttention()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    state = prefix_state_dict(model)
    assert sorted(state) == CLASSIFIER + ATTENTION_PREFIXES
    for name, tensor in state.items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()


def test_the_buffers_of_a_head_belong_to_the_task():
    model = WithEncoder()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    assert {name for name in prefix_state_dict(model) if "running" in name or "num_batches" in name} == {
        "heads.classifier.0.running_mean",
        "heads.classifier.0.running_var",
        "heads.classifier.0.num_batches_tracked",
    }


def test_a_file_stores_tensors_by_name_and_says_what_they_are(tmp_path):
    model = WithAttention()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    save_prefix(model, tmp_path / "task.safetensors", metadata={"base_model": "tiny"})
    for name, tensor in load_file(tmp_path / "task.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert read_prefix_metadata(tmp_path / "task.safetensors") == {
        "prefix_kernels_format": "1",
        "kind": "PrefixMultiheadAttention,PrefixTuningAttention",
        "num_prefix_tokens": "3",
        "heads": json.dumps(["classifier"]),
        "base_model": "tiny",
    }
    with pytest.raises(ValueError, match=r"metadata: the names \['kind'\] are reserved"):
        save_prefix(model, tmp_path / "task.safetensors", metadata={"kind": "mine"})


def test_loading_writes_into_the_parameters_that_an_optimizer_holds():
    model = WithAttention()
    mark_only_prefix_as_trainable(model)
    before = dict(model.named_parameters())
    load_prefix(model, {name: torch.ones_like(tensor) for name, tensor in prefix_state_dict(model).items()})
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
    assert model.textbook.prefix.eq(1).all()
    assert model.textbook.prefix.requires_grad


def test_training_resumes_from_a_stored_projection(tmp_path):
    """The table is not all that a generated prefix is: what generates it is stored unless folding is asked for."""
    model = WithEncoder(projection=True)
    fresh = copy.deepcopy(model)
    for m in (model, fresh):
        mark_only_prefix_as_trainable(m)
    train(model)
    save_prefix(model, tmp_path / "task.safetensors")
    load_prefix(fresh, tmp_path / "task.safetensors")
    for m in (model, fresh):
        torch.manual_seed(5)
        m.heads["classifier"][0].reset_running_stats()
        train(m)
    assert fresh.prefix.projection
    assert torch.equal(output_of(fresh), output_of(model))


def test_a_folded_file_is_smaller_and_folds_the_encoder_that_it_is_loaded_into(tmp_path):
    model = WithEncoder(projection=True)
    save_prefix(model, tmp_path / "whole")
    save_prefix(model, tmp_path / "folded", fold=True)
    assert model.prefix.projection
    assert (tmp_path / "folded").stat().st_size < 0.2 * (tmp_path / "whole").stat().st_size
    fresh = copy.deepcopy(model)
    fresh.prefix.reset_parameters()
    load_prefix(fresh, tmp_path / "folded")
    assert not fresh.prefix.projection
    assert torch.equal(output_of(fresh), output_of(model))


def test_a_file_of_a_projection_does_not_fit_a_folded_encoder(tmp_path):
    model = WithEncoder(projection=True)
    save_prefix(model, tmp_path / "whole")
    model.prefix.fold()
    with pytest.raises(ValueError, match=r"missing: prefix.table\n  unexpected: prefix.embedding.weight, prefix.trans"):
        load_prefix(model, tmp_path / "whole")


def test_the_tensors_can_be_stored_in_another_dtype_and_are_cast_back_only_when_asked(tmp_path):
    model = WithAttention()
    save_prefix(model, tmp_path / "task", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "task").values()} == {torch.bfloat16}
    fresh = WithAttention()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=r"textbook.prefix: expected torch.float32, got torch.bfloat16 \(cast=True"):
        load_prefix(fresh, tmp_path / "task")
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    load_prefix(fresh, tmp_path / "task", cast=True)
    assert torch.equal(fresh.textbook.prefix, model.textbook.prefix.bfloat16().float())


def test_integers_of_a_head_keep_their_dtype(tmp_path):
    model = WithEncoder()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    save_prefix(model, tmp_path / "task", dtype=torch.float16)
    assert load_file(tmp_path / "task")["heads.classifier.0.num_batches_tracked"].dtype == torch.int64


def test_heads_of_a_state_dict_are_loaded_where_they_are_named_or_marked():
    model = WithAttention()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    state = prefix_state_dict(model)
    with pytest.raises(ValueError, match="unexpected: classifier.bias, classifier.weight"):
        load_prefix(WithAttention(), state)
    fresh = WithAttention()
    load_prefix(fresh, state, also_load=("classifier",))
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)
    marked = WithAttention()
    mark_only_prefix_as_trainable(marked, also_train=("classifier",))
    load_prefix(marked, state)
    assert torch.equal(marked.classifier.weight, model.classifier.weight)


def test_what_does_not_fit_is_listed_in_one_error_and_nothing_is_loaded():
    model = WithAttention()
    state = {name: torch.zeros_like(tensor) for name, tensor in prefix_state_dict(model).items()}
    state["textbook.prefixes"] = state.pop("textbook.prefix")
    state["classifier.weight"] = torch.zeros(2, EMBED)
    state["encoder.layers.1.self_attn.prefix_key"] = torch.zeros(HEADS, P + 1, EMBED // HEADS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not fit") as error:
        load_prefix(model, state)
    assert str(error.value).splitlines() == [
        "state dict does not fit the model:",
        "  missing: textbook.prefix",
        "  unexpected: classifier.weight, textbook.prefixes",
        "  encoder.layers.1.self_attn.prefix_key: expected shape [2, 3, 4], got [2, 4, 4]",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_number_of_tokens_does_not_fit(tmp_path):
    save_prefix(WithEncoder(), tmp_path / "task")
    with pytest.raises(
        ValueError, match=r"task does not.*\n  prefix.table: expected shape \[5, 4, 2, 4\], got \[3, 4,"
    ):
        load_prefix(WithEncoder(num_prefix_tokens=5), tmp_path / "task")


def test_a_stored_head_that_the_model_lacks_is_named(tmp_path):
    model = WithAttention()
    mark_only_prefix_as_trainable(model, also_train=("classifier",))
    save_prefix(model, tmp_path / "task")
    del model.classifier
    with pytest.raises(ValueError, match=r"it stores the heads \['classifier'\], which the model does not have"):
        load_prefix(model, tmp_path / "task")


def test_a_model_without_storage_is_refused():
    with torch.device("meta"):
        model = PrefixTuningAttention(EMBED, HEADS, P)
    with pytest.raises(ValueError, match="prefix: expected a parameter with storage, got one on the meta device"):
        load_prefix(model, prefix_state_dict(PrefixTuningAttention(EMBED, HEADS, P)))


def test_files_of_others_and_of_newer_versions_are_refused(tmp_path):
    save_file({"prompt_embeddings": torch.zeros(3, 4)}, tmp_path / "peft", metadata={"format": "pt"})
    save_file({"prefix.table": torch.zeros(3, 4)}, tmp_path / "newer", metadata={"prefix_kernels_format": "2"})
    with pytest.raises(ValueError, match="expected a file written by prefix_kernels.save_prefix"):
        load_prefix(WithEncoder(), tmp_path / "peft")
    with pytest.raises(ValueError, match="expected format 1 or older, got 2; update prefix_kernels"):
        load_prefix(WithEncoder(), tmp_path / "newer")
    with pytest.raises(FileNotFoundError):
        load_prefix(WithEncoder(), tmp_path / "nothing")


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "task"
    save_prefix(WithEncoder(), path)
    before = path.read_bytes()

    def fail(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(prefix_kernels.checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_prefix(WithEncoder(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_save_to_one_path_leave_one_whole_file(tmp_path):
    models = [WithEncoder() for _ in range(6)]

    def save_often(model: nn.Module) -> None:
        for _ in range(20):
            save_prefix(model, tmp_path / "task")

    with ThreadPoolExecutor(len(models)) as threads:
        list(threads.map(save_often, models))
    assert list(tmp_path.iterdir()) == [tmp_path / "task"]
    table = load_file(tmp_path / "task")["prefix.table"]
    assert sum(torch.equal(table, model.prefix.table) for model in models) == 1


@pytest.mark.parametrize("exists", [False, True])
def test_a_symbolic_link_stays_and_the_file_that_it_leads_to_is_replaced(exists, tmp_path):
    (tmp_path / "store").mkdir()
    if exists:
        save_prefix(WithEncoder(), tmp_path / "store" / "old")
    (tmp_path / "between").symlink_to("store/old")
    (tmp_path / "task").symlink_to(tmp_path / "between")
    model = WithEncoder()
    save_prefix(model, tmp_path / "task")
    assert (tmp_path / "task").is_symlink() and (tmp_path / "between").is_symlink()
    for path in (tmp_path / "task", tmp_path / "store" / "old"):
        assert torch.equal(load_file(path)["prefix.table"], model.prefix.table)
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["old"]


def test_links_that_lead_round_in_a_circle_are_refused_and_stay(tmp_path):
    (tmp_path / "task").symlink_to(tmp_path / "task")
    with pytest.raises(OSError, match="Too many levels of symbolic links: .*task"):
        save_prefix(WithEncoder(), tmp_path / "task")
    assert (tmp_path / "task").is_symlink()


def test_a_name_as_long_as_the_system_takes_is_saved_to(tmp_path):
    save_prefix(WithEncoder(), tmp_path / ("a" * 255))
    assert read_prefix_metadata(tmp_path / ("a" * 255))["kind"] == "PrefixEncoder"


# Wrappers, and holders of other kinds.


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["DataParallel", "torch.compile"],
)
def test_a_wrapped_model_has_the_names_of_the_bare_one(wrap, tmp_path):
    model = WithAttention()
    wrapped = wrap(model)
    names = mark_only_prefix_as_trainable(wrapped, also_train=("classifier",))
    assert sorted(names) == CLASSIFIER + ATTENTION_PREFIXES
    save_prefix(wrapped, tmp_path / "task")
    fresh = WithAttention()
    load_prefix(fresh, tmp_path / "task")
    assert torch.equal(fresh.textbook.prefix, model.textbook.prefix)
    load_prefix(wrap(WithAttention()), tmp_path / "task")


def test_a_compiled_part_of_a_model_has_the_names_of_the_bare_one():
    model = WithAttention()
    names = prefix_state_dict(model).keys()
    model.textbook = torch.compile(model.textbook, backend="eager")
    assert prefix_state_dict(model).keys() == names


def test_a_wrapper_that_forwards_unknown_attributes_is_no_second_holder():
    class Forwarding(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    assert list(prefix_state_dict(Forwarding(PrefixEncoder(P, LAYERS, HEADS, 4)))) == ["inner.table"]


def test_any_module_that_follows_the_protocol_is_a_holder():
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_prefix_tokens = 2
            self.tokens, self.other = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(1))

        def prefix_parameter_names(self) -> list[str]:
            return ["tokens"]

    model = nn.Sequential(nn.Linear(4, 4), Soft())
    assert mark_only_prefix_as_trainable(model) == ["1.tokens"]
    load_prefix(model, {"1.tokens": torch.zeros(2, 4)})
    assert not model[1].tokens.any()
