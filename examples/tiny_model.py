"""A causal language model small enough to be pretrained on the spot, where no model of a hub is given.

It is an ordinary folder of Transformers' (a Qwen 3 of two layers and 0.1 million parameters, and its tokenizer of whole
words), so that an example goes on as it would with ``--model``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import trange
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]


def add_model_options(parser: argparse.ArgumentParser, *, pretraining_steps: int, output_dir: str) -> None:
    """Add the options of all examples that fall back on the tiny model, with these defaults."""
    add = parser.add_argument
    add("--model", help="folder or hub name of a pretrained model (default: a tiny one, pretrained here)")
    add("--pretraining-steps", type=int, default=pretraining_steps, help="of the tiny model")
    add("--seed", type=int, default=0)
    add("--output-dir", type=Path, default=Path(output_dir))


def open_model(
    arguments: argparse.Namespace,
    words: Sequence[str],
    batch_of: Callable[[PreTrainedTokenizerFast, float], dict[str, Tensor]],
) -> tuple[str, PreTrainedTokenizerBase]:
    """The folder or hub name of the model that the options ask for, and its tokenizer, which can pad.

    The output folder is made, Transformers prints errors alone, and random numbers start from ``--seed``.

    Args:
        arguments: those of `add_model_options`.
        words, batch_of: vocabulary and training batches of the tiny model, as for `pretrained_folder`.
    """
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; training keeps its own
    folder = arguments.model or pretrained_folder(
        arguments.output_dir, words, batch_of, steps=arguments.pretraining_steps, seed=arguments.seed
    )
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return folder, tokenizer


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word; a text begins with ``<s>``."""
    ids = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no space before a full stop
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pretrained_folder(
    output_dir: Path,
    words: Sequence[str],
    batch_of: Callable[[PreTrainedTokenizerFast, float], dict[str, Tensor]],
    *,
    steps: int,
    seed: int,
) -> str:
    """The folder in ``output_dir`` with a model pretrained for ``steps``, which is trained unless it is there already.

    From then on the process computes in one thread: so small a model waits for more of them longer than they help.

    Args:
        words: the vocabulary.
        batch_of: makes what the model is called with, ``input_ids`` and ``labels``, at a point of the training between
            0 and 1.
    """
    torch.set_num_threads(1)
    folder = output_dir / f"pretrained-{steps}-steps-seed-{seed}"
    if (folder / "config.json").is_file():
        print(f"Pretrained model: {folder}")
        return str(folder)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(words)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).train()
    help_to_look_up(model)
    train(
        model.parameters(),
        lambda step: model(**batch_of(tokenizer, step / steps)).loss,
        steps=steps,
        learning_rate=5e-3,
        title="Pretraining a tiny model",
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def help_to_look_up(model: Qwen3ForCausalLM) -> None:
    """Let the second layer begin by searching for what the first one has written.

    The first layer, whose window is two words, writes at each word what the word before it was. A second layer that
    searches for that finds what followed when the present word was read before, and hands it on. Training finds this
    by itself too, but not surely in the few steps that there is time for here.
    """
    first, second = (layer.self_attn for layer in model.model.layers)

    def for_query_heads(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (-1, model.config.head_dim))
        return heads.repeat_interleave(first.num_key_value_groups, dim=0).flatten(0, 1)

    written = first.o_proj.weight @ for_query_heads(first.v_proj.weight)
    second.q_proj.weight.copy_(for_query_heads(second.k_proj.weight) @ written)
    second.o_proj.weight.copy_(for_query_heads(second.v_proj.weight).T)


def layers_that_see_all(config: PretrainedConfig) -> list[int]:
    """The layers of a model without a sliding window, which are the ones that a prefix of these examples is for.

    A window of two words is no place for a prefix that is always seen.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [number for number, kind in enumerate(kinds) if kind == "full_attention"]


def train(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    title: str,
) -> list[float]:
    """Minimise ``loss_of(step)`` by AdamW with a short warm-up and a cosine decay, and return all losses."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warm_up = max(1, min(30, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )
    losses = []
    with trange(steps, desc=title) as progress:
        for step in progress:
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses
