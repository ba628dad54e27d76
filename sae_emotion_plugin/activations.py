"""Texts -> activation batches at a hook, with BOS and padding left out; and the few model calls everything shares."""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

BATCH_TOKENS = 1024
"""Of a forward pass. On a CPU 512 to 1,024 tokens, whose activations stay in its caches, took 10 to 15 % less time than
2,048 or 4,096."""

Pooling = Literal["max", "mean", "last", "sum"]
"""How the vectors or codes of a text's tokens become one: their maximum, mean, sum, or the last token's."""


@runtime_checkable
class HookedModel(Protocol):
    """What we call of a hooked model: TransformerBridge and HookedTransformer both have it."""

    cfg: Any
    tokenizer: Any
    hook_dict: Any

    def hooks(self, fwd_hooks: Any = ...) -> AbstractContextManager[Any]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class TokenWindow:
    """A stretch of one text that fits the context, BOS first when the model wants one."""

    text_index: int
    start: int
    """Position, in the text's tokens, of the first token after BOS."""
    token_ids: tuple[int, ...]
    bos: bool


@dataclass(frozen=True)
class ActivationBatch:
    """The residual (or other) vectors of some tokens, in no particular order of texts."""

    vectors: Float[Tensor, "token d_in"]
    text_index: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    """Position of the token in its text, BOS not counted."""
    token_ids: Int[np.ndarray, " token"]


def canonical_hook(model: HookedModel, hook_name: str) -> str:
    """The name under which the model itself keeps the hook `hook_name`.

    TransformerBridge ignores a hook name that it does not keep, classic aliases such as `blocks.0.hook_resid_post`
    among them, without a word; so every name goes through here first.

    Raises:
        ValueError: the model has no such hook; the message names hooks that it has.
    """
    if hook_name in model.hook_dict:
        return _named(model, hook_name)
    collect = getattr(model, "_collect_hook_aliases_from_registry", None)
    aliases = {**getattr(model, "hook_aliases", {}), **collect()} if collect else {}
    resolved = aliases.get(hook_name)
    if isinstance(resolved, str) and resolved in model.hook_dict:
        return _named(model, resolved)
    residual = sorted(
        (name for name in {*model.hook_dict, *aliases} if name.endswith("hook_resid_post")),
        key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")],
    )
    raise ValueError(
        f"the model has no hook {hook_name!r} (valid: {residual[0]} to {residual[-1]}, among others)"
        if residual
        else f"the model has no hook {hook_name!r} (valid: {', '.join(list(model.hook_dict)[:5])}, ...)"
    )


def _named(model: HookedModel, hook_name: str) -> str:
    # SAELens's `saes` leaves a bridge with a hook point that has lost its name: hooks on it would never be called.
    model.hook_dict[hook_name].name = hook_name
    return hook_name


def hook_layer(hook_name: str) -> int | None:
    """The block a hook sits in, or None for a hook outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    return int(match.group(1)) if match else None


def tokenize(
    model: HookedModel, texts: Sequence[str], *, context_size: int = 128, prepend_bos: bool = True
) -> list[TokenWindow]:
    """The windows of all texts; a text longer than the context becomes several, each with its own BOS.

    A model whose own context is shorter than `context_size` sets the limit.
    """
    if len(texts) == 0:
        return []
    tokenizer = model.tokenizer
    room = context_room(model, context_size=context_size, prepend_bos=prepend_bos)
    bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    windows = []
    split = 0
    for index, ids in enumerate(tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        split += len(ids) > room
        for start in range(0, len(ids), room):
            windows.append(TokenWindow(index, start, (*bos, *ids[start : start + room]), bool(bos)))
    if split:
        # No warning: training documents are split as a matter of course, and a cached encoding comes by in blocks.
        logger.info("%d of %d texts are longer than %d tokens and were split", split, len(texts), room)
    return windows


def context_room(model: HookedModel, *, context_size: int = 128, prepend_bos: bool = True) -> int:
    """How many tokens of a text fit one window: the context, or the model's own if that is shorter, without BOS."""
    context_size = min(context_size, int(model.cfg.n_ctx))
    bos = int(prepend_bos and model.tokenizer.bos_token_id is not None)
    if context_size <= bos:
        raise ValueError(f"context_size {context_size} leaves no room for a token (at least {bos + 1})")
    return context_size - bos


def activation_batches(
    model: HookedModel,
    texts: Sequence[str],
    hook_name: str,
    *,
    context_size: int = 128,
    prepend_bos: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Iterator[ActivationBatch]:
    """The activations of all texts at one hook, batch by batch, texts of like length together.

    The forward pass stops behind the hook's block. Windows are padded on the right, where a causal model's earlier
    positions cannot see it; padding and BOS never appear. A batch that does not fit the device's memory is halved.
    """
    windows = sorted(
        tokenize(model, texts, context_size=context_size, prepend_bos=prepend_bos),
        key=lambda window: (len(window.token_ids), window.text_index, window.start),
    )
    capture = hook_capture(model, hook_name)
    total = sum(len(window.token_ids) - window.bos for window in windows)
    with tqdm(total=total, unit="token", desc="reading activations", disable=not progress) as bar:
        for batch in length_batches(windows, batch_tokens):
            result = _run(capture, batch)
            bar.update(len(result.token_ids))
            yield result


def hook_capture(model: HookedModel, hook_name: str) -> Callable[[Int[Tensor, "row position"]], Tensor]:
    """A function from token ids to the activations at the hook, `[row position d_in]`, stopping behind its block."""
    captures = hook_captures(model, [hook_name])
    return lambda tokens: captures(tokens)[0]


def hook_captures(
    model: HookedModel, hook_names: Sequence[str]
) -> Callable[[Int[Tensor, "row position"]], tuple[Tensor, ...]]:
    """A function from token ids to the activations at each hook, `[row position d_in]`, in the order of the names.

    One forward pass serves all hooks; it stops behind the last one's block.

    Raises:
        ValueError: the model lacks one of the hooks, or none is named.
    """
    if not hook_names:
        raise ValueError("no hook to read activations at: the list of hook names is empty")
    names = [canonical_hook(model, name) for name in hook_names]
    layers = [hook_layer(name) for name in names]
    stop = {} if None in layers else _stop_behind(model, max(layer for layer in layers if layer is not None))

    def capture(tokens: Int[Tensor, "row position"]) -> tuple[Tensor, ...]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> tuple[str, Callable[[Tensor, Any], None]]:
            return name, lambda tensor, hook: seen.update({name: tensor})

        with torch.inference_mode(), model.hooks(fwd_hooks=[keep(name) for name in dict.fromkeys(names)]):
            model(tokens.to(model_device(model)), **stop)
        # Attention heads' outputs arrive as [row position head d_head]; one vector a token is what an SAE reads.
        return tuple(seen[name].flatten(start_dim=2) for name in names)

    return capture


def _stop_behind(model: HookedModel, layer: int) -> dict[str, int]:
    """Arguments with which a forward pass does the least behind a block; the unembedding can be most of the work."""
    inner = getattr(model, "original_model", None)
    if inner is None or layer + 1 < model.cfg.n_layers:
        return {"stop_at_layer": layer + 1}
    # A bridge stops at blocks only. Behind its last one it may leave out the logits of all positions but one.
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


def mean_norm(
    model: HookedModel,
    texts: Sequence[str],
    hook_name: str,
    *,
    context_size: int = 128,
    prepend_bos: bool = True,
) -> float:
    """The mean Euclidean norm of the activations at a hook over all tokens of the texts, BOS excluded.

    BOS is left out because its norm can be an order of magnitude above any other token's.
    """
    total, count = 0.0, 0
    for batch in activation_batches(
        model, texts, hook_name, context_size=context_size, prepend_bos=prepend_bos, progress=False
    ):
        total += float(batch.vectors.float().norm(dim=-1).double().sum())
        count += len(batch.vectors)
    if not count:
        raise ValueError("no tokens to measure a norm on: the texts are empty")
    return total / count


def model_device(model: HookedModel) -> torch.device:
    """The device that token ids have to be on."""
    return torch.device(str(model.cfg.device))


def length_batches(windows: Sequence[TokenWindow], batch_tokens: int) -> Iterator[list[TokenWindow]]:
    """The windows, sorted by length, in batches of at most `batch_tokens` with the padding, or of one window."""
    batch: list[TokenWindow] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window.token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def padded_windows(
    windows: Sequence[TokenWindow],
) -> tuple[Int[np.ndarray, "window position"], Bool[np.ndarray, "window position"]]:
    """The token ids of the windows, padded on the right, and where they are tokens of a text: neither BOS nor padding.

    Padding is token 0; a causal model's earlier positions cannot see it.
    """
    lengths = [len(window.token_ids) for window in windows]
    tokens = np.zeros((len(windows), max(lengths)), dtype=np.int64)
    wanted = np.zeros(tokens.shape, dtype=bool)
    for row, window in enumerate(windows):
        tokens[row, : lengths[row]] = window.token_ids
        wanted[row, window.bos : lengths[row]] = True
    return tokens, wanted


def captured_halving(
    captures: Callable[[Tensor], tuple[Tensor, ...]], tokens: Int[Tensor, "row position"]
) -> tuple[Tensor, ...]:
    """What `captures` gives for the tokens, half of the rows at a time where all do not fit the device's memory."""
    try:
        return captures(tokens)
    except torch.OutOfMemoryError:
        if len(tokens) == 1:
            raise
        torch.cuda.empty_cache()
        logger.warning("out of memory with %d rows of %d tokens: halving the batch", *tokens.shape)
        middle = len(tokens) // 2
        halves = [captured_halving(captures, part) for part in (tokens[:middle], tokens[middle:])]
        return tuple(torch.cat(pair) for pair in zip(*halves, strict=True))


def _run(capture: Callable[[Tensor], Tensor], batch: list[TokenWindow]) -> ActivationBatch:
    tokens, wanted = padded_windows(batch)
    (acts,) = captured_halving(lambda part: (capture(part),), torch.from_numpy(tokens))
    rows, columns = np.nonzero(wanted)
    starts = np.array([window.start - window.bos for window in batch])
    texts = np.array([window.text_index for window in batch])
    return ActivationBatch(
        vectors=acts[torch.from_numpy(rows).to(acts.device), torch.from_numpy(columns).to(acts.device)],
        text_index=texts[rows],
        position=starts[rows] + columns,
        token_ids=tokens[rows, columns],
    )
