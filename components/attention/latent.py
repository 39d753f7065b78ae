"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are products of one short latent per token, which is all that is cached, beside a few
key lanes that rope turns and that all heads share. Rows attend in one of two ways, which are one formula:

- expanded: keys and values of every head are made from the cached latents;
- absorbed: queries are brought into the latent's space instead, so that the cached rows are the keys, and the values,
  of a single head; what comes out is brought to the heads' values afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.attention.kernels import Memo, attention, attention_rows
from zoo.components.attention.scaling import scaled
from zoo.components.attention.spec import LatentAttentionSpec
from zoo.components.build import make
from zoo.components.linear import Linear
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
            self.q_norm = make(children["q_norm"])
            self.q_b = Linear(spec.q_lora_rank, width)
        self.kv_a = Linear(spec.dim, spec.kv_lora_rank + spec.rope_head_dim)
        self.kv_norm = make(children["kv_norm"])
        self.kv_b = Heads(spec)
        self.o = Linear(spec.num_heads * spec.v_head_dim, spec.dim)
        self.rope = make(spec.rope)

    def forward(self, x_TD: Tensor, step: Step, state: LatentState) -> Tensor:
        """(T, D) to (T, D); appends this step's latents to `state`."""
        q_THd = self._queries(x_TD, step)
        state.append(self._latents(x_TD, step))
        parts, first = [], 0
        for cached in state.read():
            last = first + cached.rows * len(cached.kept_BSm)
            parts.append(self.kv_b(q_THd[first:last], cached, step.memo))
            first = last
        o_TD: Tensor = self.o(torch.cat(parts).flatten(1))
        return o_TD

    def _queries(self, x_TD: Tensor, step: Step) -> Tensor:
        spec = self.spec
        q_TA = self.q(x_TD) if spec.q_lora_rank is None else self.q_b(self.q_norm(self.q_a(x_TD)))
        q_THd = q_TA.view(-1, spec.num_heads, spec.qk_head_dim)
        plain_THd, turned_THr = q_THd.split_with_sizes((spec.nope_head_dim, spec.rope_head_dim), -1)
        q_THd = torch.cat((plain_THd, self.rope(turned_THr, step)), -1)
        return q_THd if spec.query_scaling is None else scaled(q_THd, spec.query_scaling, step)

    def _latents(self, x_TD: Tensor, step: Step) -> Tensor:
        """The rows that are cached: the normed latent, then the turned lanes."""
        sizes = (self.spec.kv_lora_rank, self.spec.rope_head_dim)
        latent_Tc, turned_Tr = self.kv_a(x_TD).split_with_sizes(sizes, -1)
        return torch.cat((self.kv_norm(latent_Tc), self.rope(turned_Tr.unsqueeze(1), step).squeeze(1)), -1)


class Heads(nn.Module):
    """The matrix from latents to the keys and values of every head, and attention through it."""

    def __init__(self, spec: LatentAttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.scale = spec.score_scale
        rows = spec.num_heads * (spec.nope_head_dim + spec.v_head_dim)
        self.weight = nn.Parameter(torch.empty(rows, spec.kv_lora_rank))

    def forward(self, q_THd: Tensor, cached: Cached, memo: Memo) -> Tensor:
        """(T, H, v) of queries over what is cached of their sequences, by the way that needs less work."""
        if cached.seen_BS is not None:
            return self.absorbed(q_THd, cached, memo)
        ways = self.expanded if self.expands(cached.rows, cached.kept_BSm.shape[1]) else self.absorbed
        return ways(q_THd, cached, memo)

    def expands(self, rows: int, keys: int) -> bool:
        """Whether keys and values of every head take fewer operations than queries in the latent's space."""
        spec, up = self.spec, self.spec.nope_head_dim + self.spec.v_head_dim
        expanded = keys * spec.kv_lora_rank * up + rows * keys * (spec.qk_head_dim + spec.v_head_dim)
        absorbed = rows * spec.kv_lora_rank * up + rows * keys * 2 * (spec.kv_lora_rank + spec.rope_head_dim)
        return expanded < absorbed

    def expanded(self, q_THd: Tensor, cached: Cached, memo: Memo) -> Tensor:
        """Keys and values of every head, padded with zeros to one size where a kernel wants one."""
        [kept_Sm], spec = cached.kept_BSm, self.spec
        latent_Sc, turned_Sr = kept_Sm.split_with_sizes((spec.kv_lora_rank, spec.rope_head_dim), -1)
        kv_SHd = F.linear(latent_Sc, self.weight).view(-1, spec.num_heads, spec.nope_head_dim + spec.v_head_dim)
        plain_SHd, v_SHd = kv_SHd.split_with_sizes((spec.nope_head_dim, spec.v_head_dim), -1)
        k_SHd = torch.cat((plain_SHd, turned_Sr.unsqueeze(1).expand(-1, spec.num_heads, -1)), -1)
        width = max(spec.qk_head_dim, spec.v_head_dim)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q_THd, k_SHd, v_SHd))
        past = len(kept_Sm) - cached.rows
        o_THd = attention(q, k.transpose(0, 1), v.transpose(0, 1), scale=self.scale, past=past, window=None, memo=memo)
        return o_THd[..., : spec.v_head_dim]

    def absorbed(self, q_THd: Tensor, cached: Cached, memo: Memo) -> Tensor:
        """Cached rows as keys and values of one head: of what comes out, the latent's lanes are taken."""
        spec, kept_BSm = self.spec, cached.kept_BSm
        up_HOc = self.weight.view(spec.num_heads, -1, spec.kv_lora_rank)
        k_up_HOc, v_up_HOc = up_HOc.split_with_sizes((spec.nope_head_dim, spec.v_head_dim), 1)
        plain_HTd = q_THd[..., : spec.nope_head_dim].transpose(0, 1)
        q_THm = torch.cat(((plain_HTd @ k_up_HOc).transpose(0, 1), q_THd[..., spec.nope_head_dim :]), -1)
        if cached.seen_BS is None:
            past = kept_BSm.shape[1] - cached.rows
            o_THm = attention(q_THm, kept_BSm, kept_BSm, scale=self.scale, past=past, window=None, memo=memo)
        else:
            kept_B1Sm = kept_BSm.unsqueeze(1)
            o_THm = attention_rows(q_THm, kept_B1Sm, kept_B1Sm, scale=self.scale, seen_BS=cached.seen_BS, memo=memo)
        latent_HTc = o_THm[..., : spec.kv_lora_rank].transpose(0, 1)
        return (latent_HTc @ v_up_HOc.transpose(1, 2)).transpose(0, 1)
