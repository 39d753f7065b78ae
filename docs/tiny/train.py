"""Trains the embedded model and writes it in Mistral's own layout.

    python docs/tiny/tokenizer.py --out cards/tiny
    python docs/tiny/train.py --out cards/tiny

The model is built from its card by zoo itself and trained in float32 on the CPU, on conversations that text.py makes
from the cards: the loss counts the answers only, plus a term that keeps the experts evenly used (Fedus et al.,
arXiv 2101.03961, formula 4).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from data import IGNORED, Batch, Ids, batches
from export import save
from facts import read_cards
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.attention.gqa import Attention
from zoo.components.build import build
from zoo.components.decoder.model import Decoder
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.ffn.router import SoftmaxTopk
from zoo.components.step import Step
from zoo.registry.card import load_card
from zoo.registry.resolve import resolve

BALANCE = 0.01
CLIP = 1.0


class PackedWindow:
    """Attention states for training: windowed attention over packed segments, one window of rows at a time.

    A block of rows needs its own keys and those of the block before it, which makes all blocks one batch.
    """

    def __init__(self, segments_T: Tensor, window: int) -> None:
        self.rows, self.window = len(segments_T), window
        self.blocks = -(-self.rows // window)
        order = torch.arange(self.blocks * window).view(self.blocks, window)
        keys_NS = torch.cat((order - window, order), dim=1)
        segments = F.pad(segments_T, (window, self.blocks * window - self.rows), value=-1)
        same = segments[order + window].unsqueeze(2) == segments[keys_NS + window].unsqueeze(1)
        distance = order.unsqueeze(2) - keys_NS.unsqueeze(1)
        seen = same & (distance >= 0) & (distance < window)
        seen |= distance == 0
        self.mask_N1TS = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).unsqueeze(1)

    def attend(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, *, scale: float, window: int | None) -> Tensor:
        assert window == self.window
        q_NHWd = self._blocks(q_THd).transpose(1, 2)
        k_NGSd, v_NGSd = (self._with_previous(self._blocks(x)).transpose(1, 2) for x in (k_TGd, v_TGd))
        o_NHWd = F.scaled_dot_product_attention(
            q_NHWd, k_NGSd, v_NGSd, attn_mask=self.mask_N1TS, scale=scale, enable_gqa=True
        )
        return o_NHWd.transpose(1, 2).reshape(-1, *q_THd.shape[1:])[: self.rows]

    def _blocks(self, x_TNd: Tensor) -> Tensor:
        padded = F.pad(x_TNd, (0, 0, 0, 0, 0, self.blocks * self.window - self.rows))
        return padded.view(self.blocks, self.window, *x_TNd.shape[1:])

    def _with_previous(self, x: Tensor) -> Tensor:
        return torch.cat((F.pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=1)


def step_of(batch: Batch, model: Decoder) -> Step:
    """The step in which the model sees a whole batch."""
    mixers = [module for module in model.modules() if isinstance(module, Attention)]
    windows = {mixer.spec.window for mixer in mixers}
    assert len(windows) == 1, "training knows one window for all layers"
    window = windows.pop()
    assert window is not None
    state = PackedWindow(batch.segments_T, window)
    rows = torch.bincount(batch.segments_T).tolist()
    return Step(batch.positions_T, rows, [0] * len(rows), [state] * len(mixers))


class Balance:
    """Sums the load-balancing terms of all routers in a forward pass: experts x (share of choices . mean weight)."""

    def __init__(self, model: Decoder) -> None:
        self.total = torch.zeros(())
        self.load: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, SoftmaxTopk):
                module.register_forward_hook(self._add)

    def _add(self, router: SoftmaxTopk, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        count = router.spec.num_experts
        shares_E = torch.bincount(output[1].flatten(), minlength=count) / output[1].numel()
        means_E = F.linear(inputs[0], router.weight).softmax(-1).mean(0)
        self.total = self.total + count * (shares_E * means_E).sum()
        self.load.append(shares_E)

    def take(self) -> Tensor:
        """The sum since the last call."""
        total, self.total, self.load = self.total, torch.zeros(()), []
        return total


def drop_out(model: Decoder, share: float) -> None:
    """In training mode, sets a share of what every mixer and feed-forward adds to zero, and of the embeddings."""

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return F.dropout(output, share, training=module.training)

    for layer in model.layers:
        layer.get_submodule("mixer").register_forward_hook(drop)
        layer.get_submodule("ffn").register_forward_hook(drop)
    model.embed.register_forward_hook(drop)


def new_model(card: str, seed: int) -> Decoder:
    """The card's model in float32 with seeded weights: scales 1, matrices normal by their input size."""
    spec = resolve(load_card(card)).model
    assert isinstance(spec, DecoderSpec)
    model = build(spec, device="cpu")
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * len(spec.layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            scale = 0.5 if name == "embed.weight" else parameter.shape[-1] ** -0.5
            if name.endswith(("mixer.o.weight", "experts_down")):
                scale /= depth
            parameter.normal_(0, scale, generator=generator)
    return model


def optimizer_of(model: Decoder, rate: float) -> torch.optim.AdamW:
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and n != "embed.weight"]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or n == "embed.weight"]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-9)


def rate_at(step: int, steps: int) -> float:
    """Warm-up over the first fortieth, then a cosine to 2 % of the peak."""
    warm = steps / 40
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def answer_loss(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of the answers' ids, and for each of them whether it was the likeliest."""
    rows = (batch.targets_T != IGNORED).nonzero().squeeze(1)
    logits_RV = model(batch.tokens_T, step_of(batch, model), rows)
    targets_R = batch.targets_T[rows]
    return F.cross_entropy(logits_RV, targets_R), logits_RV.argmax(-1) == targets_R


def train(model: Decoder, stream: Iterator[Batch], unseen: Sequence[Batch], *, steps: int, rate: float) -> None:
    """Trains in place. `unseen`: batches of held-out questions, looked at every 250 steps."""
    optimizer, balance = optimizer_of(model, rate), Balance(model)
    started, shown = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps)
        loss, _ = answer_loss(model, next(stream))
        load = max(float(shares.max()) for shares in balance.load)
        (loss + BALANCE * balance.take()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            _log(f"step {step} loss {shown:.4f} busiest expert {load:.2f} seconds {time.time() - started:.0f}")
        if step % 250 == 249:
            _log(f"held-out answers right word for word: {exactness(model, unseen):.4f}")
            balance.take()


def exactness(model: Decoder, stream: Iterable[Batch]) -> float:
    """The share of answers that greedy decoding would write word for word."""
    right = total = 0
    model.eval()
    with torch.no_grad():
        for batch in stream:
            _, hits_R = answer_loss(model, batch)
            rows = (batch.targets_T != IGNORED).nonzero().squeeze(1)
            starts = torch.cat((torch.ones(1, dtype=torch.bool), rows[1:] != rows[:-1] + 1))
            answers = starts.cumsum(0) - 1
            misses = torch.zeros(int(answers[-1]) + 1).index_add_(0, answers, (~hits_R).float())
            right, total = right + int((misses == 0).sum()), total + len(misses)
    model.train()
    return right / total


def _log(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that holds tekken.json and gets the weights")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=4096, help="ids per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--drop", type=float, default=0.1, help="share of activations dropped in training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cards, ids = read_cards(), Ids(options.out / "tekken.json")
    model = new_model("tiny", options.seed)
    drop_out(model, options.drop)
    stream = batches(cards, ids, tokens=options.tokens, seed=options.seed + 1)
    unseen = list(islice(batches(cards, ids, tokens=options.tokens, seed=options.seed + 2, held_out=True), 8))
    train(model, stream, unseen, steps=options.steps, rate=options.rate)
    _log(f"held-out answers right word for word: {exactness(model, unseen):.4f}")
    save(model, options.out)


if __name__ == "__main__":
    main()
