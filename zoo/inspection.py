"""What a model costs, from its card alone: parameters, bytes, cache, operations. Imports no torch, reads no weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.asking import context_of, whole
from zoo.components.compiled import packs
from zoo.components.decoder.spec import DecoderSpec
from zoo.costs.memory import MemoryPlan, stored_bytes
from zoo.costs.work import BYTES as BYTES
from zoo.costs.work import Work, usual_dtype
from zoo.machine import free_memory, gpus_free, total_memory
from zoo.registry.card import Card
from zoo.registry.errors import RequestError, ZooError
from zoo.registry.plan import phrase
from zoo.registry.resolve import Plan

SPEED_BATCHES = (1, 8, 32)
"""Sequences that decode together in the figures of speed."""


@dataclass(frozen=True)
class Inspection:
    """A card's arithmetic. `dtype` is the format that the byte figures assume.

    resolved: None for a card that says `unsupported`: `to_dict` then tells what is known, all else raises CardError.
    folder: where the weights lie on this machine, or None when they would have to be fetched.
    owners: who provides the card and each component kind, as "slot kind" -> owner.
    quantize: the kind in which large matrices are reckoned; None for all in `dtype`.
    usual: `dtype` is the card's own: this machine's memory is judged in what a run takes instead where it has to.
    """

    card: Card
    resolved: Plan | None
    dtype: str
    folder: Path | None
    owners: dict[str, str]
    quantize: str | None = None
    usual: bool = False

    @property
    def plan(self) -> Plan:
        """The resolved card."""
        if self.resolved is None:
            raise self.card.refusal()
        return self.resolved

    @property
    def parameters(self) -> int:
        """Stored parameters in all."""
        return sum(p.numel for p in self.plan.model.all_parameters().values())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses, embeddings counted whole: of a mixture, the chosen experts only."""
        parameters = self.plan.model.all_parameters().items()
        return round(sum(p.numel * (1 if name == "embed.weight" else p.active) for name, p in parameters))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`, or as `quantize` stores them."""
        return stored_bytes(self._work)

    @property
    def cache_dtype(self) -> str | None:
        """Codes in which keys and values are cached; None where they are kept in `dtype`."""
        assert isinstance(self.plan.model, DecoderSpec)
        return self.plan.model.cache_dtype

    @property
    def cache_bytes_per_sequence(self) -> int:
        """Bytes of cache that a sequence holds however short it is: states of constant size."""
        return self.cache_bytes(0)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that each further token adds to the cache while no window is full."""
        return self.cache_bytes(2) - self.cache_bytes(1)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of cache that one sequence of `tokens` tokens holds. Raises RequestError for no number of them."""
        if not whole(tokens) or tokens < 0:
            raise RequestError("out of range", where="tokens", found=repr(tokens), expected="a whole number, 0 or more")
        assert isinstance(self.plan.model, DecoderSpec)
        size = BYTES[self.dtype]
        return sum(state.nbytes(tokens, size) for state in self.plan.model.states() if state)

    def flops_per_token(self, context: int = 0) -> float:
        """Floating-point operations for one token of text that sees `context` earlier ones; encoders work on others."""
        encoders = self.encoders()
        return sum(
            spec.flops(context) for path, spec in self.plan.model.walk() if path.partition(".")[0] not in encoders
        )

    def encoders(self) -> dict[str, str]:
        """The encoders of images and sounds by their node, in words."""
        assert isinstance(self.plan.model, DecoderSpec)
        return {name: phrase(encoder) for name, encoder in self.plan.model.encoders().items()}

    def memory_plan(self, context: int | None = None, gpu: int | None = None) -> MemoryPlan:
        """What a sequence of `context` tokens (the card's context length) needs of this machine's main memory, or of a
        GPU with `gpu` bytes free. What is asked for must fit; without, a model runs that fits with a short sequence.

        Raises RequestError for more tokens than the card's context length, which no run takes."""
        plan = MemoryPlan(self._work, context_of(self.card, context, "context"), 0, asked=context is not None)
        if gpu is not None:
            return replace(plan, device="cuda", process=0, free=gpu)
        work = replace(self._work, dtype=usual_dtype(self.dtype, "cpu")) if self.usual else self._work
        return replace(plan, work=work, free=free_memory(), elsewhere=self._on_gpus)

    @property
    def _packed(self) -> bool:
        """Whether this machine's CPU keeps the weights packed."""
        return self.dtype == "bfloat16" and packs()

    @property
    def _work(self) -> Work:
        return Work(self.plan, self.dtype, self.quantize)

    def _on_gpus(self, short: MemoryPlan) -> list[str]:
        """What a run that has no room in main memory needs of this machine's GPUs."""
        frees = gpus_free()
        if not frees:
            return []
        from zoo.devices.advice import fewest

        there = replace(short, work=self._work, device="cuda", process=0)
        return fewest(there, plan=self.plan, frees=frees, counts=range(1, len(frees) + 1))

    def memory(self, context: int) -> int:
        """Bytes needed to run one sequence of `context` tokens: weights, cache and working space."""
        return self.memory_plan(context).total

    def fits(self, context: int) -> bool:
        """Whether this machine's main memory has room now for one sequence of `context` tokens."""
        return self.memory_plan(context).fits

    def largest_context(self) -> int:
        """The longest sequence, up to the card's context length, that fits this machine's memory now; 0 if none."""
        return self.memory_plan().most

    def speed(self, prompt: int = 512, context: int = 1024) -> dict[str, Any]:
        """What this machine's stored measurements let expect: the first token of a prompt, and decode steps, of a CPU
        with its memory as it is read now (`read_bytes_per_second`, None where that cannot be told).

        `why` says why there are no such figures; `rough` is then what a glance at memory's speed lets expect of the
        CPU, or None. `unmeasured`: which parts were reckoned like others.
        """
        from zoo.costs.forecast import forecast
        from zoo.costs.glance import glance, read_rate
        from zoo.costs.profile import profile_file, stored

        device = "cuda" if profile_file("cuda").exists() else "cpu"
        work = replace(self._work, packed=self._packed)
        try:
            profile = stored(device)
            rate = read_rate() if device == "cpu" else None
            known = forecast(profile, work, device, rate)
        except ZooError as error:
            return {"why": str(error), "rough": glance(work, context)}
        first = known.prefill(prompt)
        steps = {batch: known.decode(batch, context) for batch in SPEED_BATCHES}
        return {
            "device": profile.device,
            "measured": profile.measured,
            "read_bytes_per_second": rate,
            "prefill": {"tokens": prompt, "seconds": first.total, "parts": first.to_dict()},
            "decode": [
                {"batch": b, "context": context, "tokens_per_second": b / s.total, "parts": s.to_dict()}
                for b, s in steps.items()
            ],
            "unmeasured": sorted(known.unknown),
        }

    def layers(self) -> list[dict[str, Any]]:
        """The layer table: equal layers in one row, wherever they stand."""
        rows: dict[tuple[Any, ...], list[str]] = {}
        for row in self.plan.table():
            rows.setdefault((("block", row.block), *row.parts.items()), []).append(row.layers)
        return [{"layers": ", ".join(places), **dict(parts)} for parts, places in rows.items()]

    def to_dict(self, context: int | None = None, prompt: int = 512) -> dict[str, Any]:
        """Everything above as plain data; `context` (tokens) defaults to the card's context length.

        prompt: tokens of the prompt whose first answer `speed` tells of.
        """
        if not self.resolved:
            return self._facts()
        figures, most = self._figures(context), self.card.context_length
        return self._facts() | figures | {"speed": self.speed(min(prompt, most), min(context or 1024, most))}

    def _facts(self) -> dict[str, Any]:
        card = self.card
        return {
            "name": card.name,
            "family": card.family,
            "summary": card.summary,
            "license": card.license,
            "released": card.released.isoformat() if card.released else None,
            "context_length": card.context_length,
            "source": card.source.model_dump(),
            "folder": str(self.folder) if self.folder else None,
            "features": [*card.text.features],
            "unsupported": card.unsupported,
            "dtype": self.dtype,
            "quantize": self.quantize,
        }

    def _figures(self, context: int | None) -> dict[str, Any]:
        # What a run takes if nothing is said of devices.
        gpus = [self.memory_plan(context, free).to_dict() for free in gpus_free()[:1]]
        return {
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "weight_bytes": self.weight_bytes,
            "cache_dtype": self.cache_dtype,
            "cache_bytes_per_sequence": self.cache_bytes_per_sequence,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "flops_per_token": self.flops_per_token(0),
            "memory": self.memory_plan(context).to_dict() | {"machine_bytes": total_memory()},
            "gpu_memory": gpus[0] if gpus else None,
            "encoders": self.encoders(),
            "layers": self.layers(),
            "owners": self.owners,
        }
