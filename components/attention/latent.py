"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are products of one short latent per token, which is all that is cached, beside a few
key lanes that rope turns and that all heads share. Rows attend in one of two ways, which are one formula:

- expanded: keys and values of every head are made from the cached latents;
- absorbed: queries are brought into the latent's space instead, so that the cached rows are the keys, and the values,
  of a single head; what comes out is brought to the heads' values afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.attention.kernels import Memo, attention, attention_chosen, attention_rows
from zoo.components.attention.scaling import SSMax, scaled
from zoo.components.attention.spec import LatentAttentionSpec
from zoo.components.build import make
from zoo.components.linear import Linear
from zoo.components.native import latent as kernels
from zoo.components.native.latent import InSlabs, Sizes
from zoo.components.step import Cached, LatentState, Step


class LatentAttention(nn.Module):
    """Projects to queries and to a latent of keys and values, turns some lanes, attends, projects back."""

    def __init__(self, spec: LatentAttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        children = spec.children()
        width = spec.num_heads * spec.qk_head_dim
        if spec.q_lora_rank is None:
            self.q = Linear(spec.dim, width)
        else:
            self.q_a = Linear(spec.dim, spec.q_lora_rank)
            self.q_a_norm = make(children["q_a_norm"])
            self.q_b = Linear(spec.q_lora_rank, width)
        if not spec.shares:
            self.kv_a = Linear(spec.dim, spec.kv_lora_rank + spec.rope_head_dim)
            self.kv_a_norm = make(children["kv_a_norm"])
        self.kv_b = Heads(spec)
        self.o = Linear(spec.num_heads * spec.v_head_dim, spec.dim)
        self.ssmax = SSMax(spec.num_heads) if spec.ssmax else None
        self.rope = None if spec.rope is None else make(spec.rope)
        self.indexer: Any = None if spec.indexer is None else make(spec.indexer)

    def forward(self, x_TD: Tensor, step: Step, state: LatentState | None) -> Tensor:
        """(T, D) to (T, D); appends this step's latents, and its indexer's keys, to `state`."""
        q_THd, borrowed = self._queries(x_TD, step), self.spec.borrows()
        own = self._kept(x_TD, step, state)
        latents = step.states[borrowed.layer].read(self._lying()) if borrowed else own
        chosen = [None] * len(latents) if self.indexer is None else self.indexer.choose(x_TD, own, step)
        parts, first = [], 0
        for cached, seen_TS in zip(latents, chosen, strict=True):
            last = first + cached.count
            parts.append(self.kv_b(q_THd[first:last], cached, seen_TS, step.memo))
            first = last
        o_TD: Tensor = self.o(torch.cat(parts).flatten(1))
        return o_TD

    def _lying(self) -> torch.dtype | None:
        """The type of queries, where few of them attend to rows as they lie: an indexer reads rows itself."""
        return self.kv_b.weight.dtype if self.indexer is None and self.kv_b.by_kernel() else None

    def _kept(self, x_TD: Tensor, step: Step, state: LatentState | None) -> Sequence[Cached | InSlabs]:
        """What this layer keeps of the step's sequences, this step's latents and index keys included."""
        new = [] if self.spec.shares else [self._latents(x_TD, step)]
        if self.indexer is not None and self.spec.index_dim:
            new.append(self.indexer.keys(x_TD, step))
        if state is None:
            return ()
        state.append(torch.cat(new, -1))
        return state.read(self._lying())

    def _queries(self, x_TD: Tensor, step: Step) -> Tensor:
        spec = self.spec
        q_TA = self.q(x_TD) if spec.q_lora_rank is None else self.q_b(self.q_a_norm(self.q_a(x_TD)))
        q_THd = q_TA.view(-1, spec.num_heads, spec.qk_head_dim)
        if self.rope is not None:
            plain_THd, turned_THr = q_THd.split_with_sizes((spec.nope_head_dim, spec.rope_head_dim), -1)
            q_THd = torch.cat((plain_THd, self.rope(turned_THr, step)), -1)
        if self.ssmax is not None:
            q_THd = self.ssmax(q_THd, step)
        return q_THd if spec.query_scaling is None else scaled(q_THd, spec.query_scaling, step)

    def _latents(self, x_TD: Tensor, step: Step) -> Tensor:
        """The rows that are cached: the normed latent, then the turned lanes."""
        sizes = (self.spec.kv_lora_rank, self.spec.rope_head_dim)
        latent_Tc, turned_Tr = self.kv_a(x_TD).split_with_sizes(sizes, -1)
        if self.rope is None:
            normed_Tc: Tensor = self.kv_a_norm(latent_Tc)
            return normed_Tc
        return torch.cat((self.kv_a_norm(latent_Tc), self.rope(turned_Tr.unsqueeze(1), step).squeeze(1)), -1)


class Heads(nn.Module):
    """The matrix from latents to the keys and values of every head, and attention through it."""

    def __init__(self, spec: LatentAttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.scale, self.row = spec.score_scale, spec.kv_lora_rank + spec.rope_head_dim
        rows = spec.num_heads * (spec.nope_head_dim + spec.v_head_dim)
        self.weight = nn.Parameter(torch.empty(rows, spec.kv_lora_rank))
        self.sizes = Sizes(spec.nope_head_dim, spec.rope_head_dim, spec.kv_lora_rank, spec.v_head_dim)

    def by_kernel(self) -> bool:
        """Whether the native kernels take such heads."""
        return kernels.attends(self.weight, self.sizes)

    def forward(self, q_THd: Tensor, cached: Cached | InSlabs, chosen_TS: Tensor | None, memo: Memo) -> Tensor:
        """(T, H, v) of queries over what is cached of their sequences, by the way that needs less work.

        chosen_TS: which of the keys each row sees, bool; None for all up to its own.
        """
        if isinstance(cached, InSlabs):
            q_THm = kernels.lowered(q_THd, self.weight, self.sizes)
            return kernels.lifted(kernels.attend(q_THm, cached, self.sizes.latent, self.scale), self.weight, self.sizes)
        kept_BSm = cached.kept_BSm[..., : self.row]
        if cached.seen_BS is not None:
            return self._rows(q_THd, kept_BSm, cached.seen_BS if chosen_TS is None else chosen_TS, memo)
        [kept_Sm] = kept_BSm
        if chosen_TS is not None and cached.rows == 1:
            kept_Sm, chosen_TS = kept_Sm[chosen_TS[0]], None
        ways = self.expanded if self.expands(cached.rows, len(kept_Sm)) else self.absorbed
        return ways(q_THd, kept_Sm, chosen_TS, memo)

    def expands(self, rows: int, keys: int) -> bool:
        """Whether keys and values of every head take fewer operations than queries in the latent's space."""
        spec, up = self.spec, self.spec.nope_head_dim + self.spec.v_head_dim
        expanded = keys * spec.kv_lora_rank * up + rows * keys * (spec.qk_head_dim + spec.v_head_dim)
        absorbed = rows * spec.kv_lora_rank * up + rows * keys * 2 * (spec.kv_lora_rank + spec.rope_head_dim)
        return expanded < absorbed

    def expanded(self, q_THd: Tensor, kept_Sm: Tensor, chosen_TS: Tensor | None, memo: Memo) -> Tensor:
        """Keys and values of every head, padded with zeros to one size where a kernel wants one."""
        spec = self.spec
        latent_Sc, turned_Sr = kept_Sm.split_with_sizes((spec.kv_lora_rank, spec.rope_head_dim), -1)
        kv_SHd = F.linear(latent_Sc, self.weight).view(-1, spec.num_heads, spec.nope_head_dim + spec.v_head_dim)
        plain_SHd, v_SHd = kv_SHd.split_with_sizes((spec.nope_head_dim, spec.v_head_dim), -1)
        k_SHd = torch.cat((plain_SHd, turned_Sr.unsqueeze(1).expand(-1, spec.num_heads, -1)), -1)
        width = max(spec.qk_head_dim, spec.v_head_dim)
        q_THd, k_SHd, v_SHd = (F.pad(x, (0, width - x.shape[-1])) for x in (q_THd, k_SHd, v_SHd))
        o_THd = self._attend(q_THd, k_SHd.transpose(0, 1), v_SHd.transpose(0, 1), chosen_TS, memo)
        return o_THd[..., : spec.v_head_dim]

    def absorbed(self, q_THd: Tensor, kept_Sm: Tensor, chosen_TS: Tensor | None, memo: Memo) -> Tensor:
        """Cached rows as keys and values of one head: of what comes out, the latent's lanes are taken."""
        kept_1Sm = kept_Sm.unsqueeze(0)
        return self._lifted(self._attend(self._lowered(q_THd), kept_1Sm, kept_1Sm, chosen_TS, memo))

    def _rows(self, q_BHd: Tensor, kept_BSm: Tensor, seen_BS: Tensor, memo: Memo) -> Tensor:
        """One row of each sequence, absorbed."""
        kept_B1Sm, q_BHm = kept_BSm.unsqueeze(1), self._lowered(q_BHd)
        return self._lifted(attention_rows(q_BHm, kept_B1Sm, kept_B1Sm, scale=self.scale, seen_BS=seen_BS, memo=memo))

    def _attend(self, q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, chosen_TS: Tensor | None, memo: Memo) -> Tensor:
        if chosen_TS is not None:
            return attention_chosen(q_THd, k_GSd, v_GSd, scale=self.scale, seen_TS=chosen_TS, memo=memo)
        past = k_GSd.shape[1] - len(q_THd)
        return attention(q_THd, k_GSd, v_GSd, scale=self.scale, past=past, window=None, memo=memo)

    def _lowered(self, q_THd: Tensor) -> Tensor:
        """Queries in the space of cached rows, (T, H, m)."""
        plain_HTd = q_THd[..., : self.spec.nope_head_dim].transpose(0, 1)
        latent_HTc = plain_HTd @ self._up()[0]
        return torch.cat((latent_HTc.transpose(0, 1), q_THd[..., self.spec.nope_head_dim :]), -1)

    def _lifted(self, o_THm: Tensor) -> Tensor:
        """Sums of cached rows as the heads' values, (T, H, v).

        The weight stands on the left: with few rows in bfloat16, that is six times faster on a CPU.
        """
        latent_HcT = o_THm[..., : self.spec.kv_lora_rank].permute(1, 2, 0)
        return (self._up()[1] @ latent_HcT).permute(2, 0, 1)

    def _up(self) -> tuple[Tensor, Tensor]:
        """For each head what makes keys of latents, and what makes values."""
        up_HOc = self.weight.view(self.spec.num_heads, -1, self.spec.kv_lora_rank)
        k_HOc, v_HOc = up_HOc.split_with_sizes((self.spec.nope_head_dim, self.spec.v_head_dim), 1)
        return k_HOc, v_HOc
