"""A loaded model: prompts in, completions out. Everything heavy is done by its tokenizer and its engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor

from zoo.allocator import give_back_memory
from zoo.assemble import assemble
from zoo.components.decoder.model import Decoder
from zoo.device import Placement
from zoo.devices.gather import Gathered
from zoo.devices.run import Run
from zoo.engine.engine import Engine
from zoo.engine.request import Chunk, Completion, Request, SamplingParams
from zoo.loading.files import WeightSet
from zoo.loading.fill import adapter_of
from zoo.loading.quantising import quantised_parts
from zoo.loading.reader import Progress
from zoo.prompts import Message, Prompt, Prompts, separate, shared_out
from zoo.registry.card import Card
from zoo.registry.errors import RequestError, TextError, each, within
from zoo.registry.resolve import Plan
from zoo.saving.save import FILE_BYTES, Saved, Source, save
from zoo.saving.values import Own
from zoo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Memory:
    """Bytes: weights as stored; the cache in use by unfinished requests, kept for others, at its highest, allowed."""

    weights: int
    cache_used: int
    cache_kept: int
    cache_peak: int
    cache_budget: int


class Model:
    """What `zoo.load` returns. A context manager; `close()` gives its memory back.

    card: the card that it was built from. plan: the resolved card. module: the PyTorch decoder.
    tokenizer: None for weights without one, which answer to token ids only.
    placement: device and dtype. notes: what was chosen while loading, one sentence each.
    """

    def __init__(
        self,
        plan: Plan,
        module: Decoder,
        engine: Engine,
        tokenizer: Tokenizer | TextError,
        placement: Placement,
        folder: Path | None,
        notes: Sequence[str] = (),
        files: WeightSet | None = None,
        run: Run | None = None,
    ) -> None:
        self.plan, self._module, self._engine = plan, module, engine
        self._prompts, self.placement, self.folder = Prompts(plan, tokenizer), placement, folder
        self.notes, self._files, self._run = [*notes], files, run
        if run is not None:
            run.ends_with(engine)

    # --- what it is ---------------------------------------------------------------------------------------------

    @property
    def card(self) -> Card:
        return self.plan.card

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._prompts.tokenizer

    @property
    def module(self) -> Decoder:
        return self._module

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def memory(self) -> Memory:
        return Memory(**self._engine.memory)

    # --- what it does -------------------------------------------------------------------------------------------

    def logits(
        self,
        tokens: Sequence[int],
        images: Sequence[Any] | None = None,
        *,
        audio: Sequence[Any] = (),
        adapter: str | None = "auto",
    ) -> Tensor:
        """Logits (T, V) in float32 of one full prefill of `tokens`; all else as in `generate`."""
        return self._engine.logits(tokens, adapter, self._prompts.media(images, audio))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        raw: bool = False,
        images: Sequence[Any] | None = None,
        audio: Sequence[Any] = (),
        **options: Any,
    ) -> list[Completion]:
        """One Completion per prompt, in order; all prompts run together.

        prompts: a text, a list of texts, lists of token ids, or lists of messages (`{"role": ..., "content": ...}`).
        A text is sent as the card says, as a chat turn or as raw text; `raw=True` forces raw.
        images: paths, addresses, bytes, PIL images, or prepared float tensors (3, height, width), for a model with the
        feature vision: a list for one prompt, a list of lists for several. They stand before a text, and where
        token ids and parts of messages have places for them.
        audio: sounds before a text's words, or at the places of a list of ids, for each prompt anew: paths, URLs, a
        file's bytes, pairs of samples and their rate, or float tensors (bands, frames), taken as spectrograms.
        options: fields of SamplingParams (max_tokens, temperature, top_p, top_k, min_p, seed, stop, logprobs,
        ignore_eos, adapter, ...); an unknown one raises RequestError.
        """
        params, several = SamplingParams.from_options(options), separate(prompts)
        shares, asked = shared_out(images, prompts, len(several)), []
        for (where, prompt), own in zip(each("prompts", several), shares, strict=True):
            with within(where):
                asked.append(self.request(prompt, params, raw=raw, images=own, audio=audio))
        return self._engine.generate(asked)

    def stream(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        images: Sequence[Any] | None = None,
        audio: Sequence[Any] = (),
        **options: Any,
    ) -> Iterator[Chunk]:
        """Chunks of one answer as they are made; closing the iterator cancels the request. Options as `generate`."""
        params = SamplingParams.from_options(options)
        return self._engine.stream(self.request(prompt, params, raw=raw, images=images or (), audio=audio))

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        images: Sequence[Any] | None = None,
        continue_final: bool = False,
        merge: bool = False,
        chat_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completion:
        """The answer to a conversation; its `message` is what to append to `messages`.

        tools: function definitions in OpenAI's form; the calls that the model makes are in `tool_calls`.
        continue_final: the last message is an assistant's beginning to go on from. merge: join consecutive messages of
        one role, which are refused otherwise. images: for parts of messages that are images and do not say which, else
        before the last user message's text. chat_options: settings of the chat format, such as reasoning_effort.
        options: as `generate`.
        """
        form: dict[str, Any] = {"continue_final": continue_final, "merge": merge, "chat_options": chat_options}
        return self._engine.generate([self.chat_request(messages, tools, images=images, **form, **options)])[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        images: Sequence[Any] | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """As `chat`, in chunks."""
        return self._engine.stream(self.chat_request(messages, tools, images=images, **options))

    def chat_request(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        images: Sequence[Any] | None = None,
        continue_final: bool = False,
        merge: bool = False,
        chat_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """The engine's request for a conversation; arguments as `chat`."""
        form: dict[str, Any] = {"continue_final": continue_final, "merge": merge, "options": chat_options or {}}
        params = SamplingParams.from_options(options)
        return self._prompts.chat(messages, params, images=images or (), tools=tools, **form)

    def fill(self, prefix: str, suffix: str, **options: Any) -> Completion:
        """The text between `prefix` and `suffix`; RequestError when the card does not list the feature `fim`."""
        return self._engine.generate([self.fill_request(prefix, suffix, **options)])[0]

    def stream_fill(self, prefix: str, suffix: str, **options: Any) -> Iterator[Chunk]:
        """As `fill`, in chunks."""
        return self._engine.stream(self.fill_request(prefix, suffix, **options))

    def fill_request(self, prefix: str, suffix: str, **options: Any) -> Request:
        """The engine's request for `fill`."""
        return self._prompts.fill(prefix, suffix, SamplingParams.from_options(options))

    def transcribe(self, sound: Any, *, language: str | None = None, **options: Any) -> Completion:
        """What is said in a sound; RequestError for a model without an encoder of sounds.

        sound: a path, a URL, a file's bytes, or a pair of samples (one channel) and their rate. language: two letters,
        such as en; None lets the model find out. options: as `generate`.
        """
        return self._engine.generate([self.transcription_request(sound, language=language, **options)])[0]

    def stream_transcribe(self, sound: Any, *, language: str | None = None, **options: Any) -> Iterator[Chunk]:
        """As `transcribe`, in chunks."""
        return self._engine.stream(self.transcription_request(sound, language=language, **options))

    def transcription_request(self, sound: Any, *, language: str | None = None, **options: Any) -> Request:
        """The engine's request for `transcribe`."""
        return self._prompts.transcription(sound, language, SamplingParams.from_options(options))

    def score(self, text: str | Sequence[int], images: Sequence[Any] | None = None) -> list[float]:
        """Natural log-probability of every token after the first, each given all before it.

        A text is encoded raw with its beginning-of-sequence token, so each of its own tokens is scored.
        images: before the text, or where ids have places for them.
        """
        asked = self.request(text, SamplingParams(), raw=True, images=images or ())
        ids = [*asked.prompt]
        logprobs_TV = torch.log_softmax(self._engine.logits(ids, media=asked.media)[:-1], dim=-1)
        following = torch.tensor(ids[1:], device=logprobs_TV.device)
        return cast("list[float]", logprobs_TV.gather(1, following[:, None])[:, 0].tolist())

    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """One unit vector per text, (N, D) float32 on the CPU: the mean of its tokens' final hidden states."""
        several = [texts] if isinstance(texts, str) else texts
        if not isinstance(several, list | tuple) or not several:
            raise RequestError("not texts", where="texts", found=repr(texts), expected="a text, or a list of some")
        rows = []
        for where, text in each("texts", several):
            with within(where):
                rows.append(self._engine.hidden(self.encode(text)).float().mean(0))
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1).cpu()

    # --- adapters -----------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, for the option `adapter` of requests."""
        with self._engine.between_steps() as (adapters, _):
            return adapters.names

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Loads a LoRA adapter, PEFT's folder or Mistral's lora.safetensors, and returns its name.

        name: by default the folder's or file's own. Raises WeightsError for files that are no adapter of this model,
        RequestError for a name that is taken.
        """
        adapter = adapter_of(
            path, plan=self.plan, module=self._module, part=None if self._run is None else self._run.part
        )
        name = adapter.name if name is None else name
        with self._engine.between_steps() as (adapters, _):
            adapters.add(name, adapter)
        self.notes.append(f"adapter {name}: {adapter.note}")
        return name

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Raises RequestError while requests use it, and for one that is not loaded."""
        with self._engine.between_steps() as (adapters, users):
            adapters.remove(name, users)

    def merge_adapter(self, name: str) -> None:
        """Adds an adapter to the weights for good: every request uses it then. Raises RequestError while any runs."""
        with self._engine.between_steps() as (adapters, users):
            adapters.merge(name, users)

    # --- files ---------------------------------------------------------------------------------------------------

    def save(
        self,
        folder: str | Path,
        *,
        layout: str = "auto",
        file_bytes: int = FILE_BYTES,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Saved:
        """Writes the model, with what was merged into it, to a folder that `zoo.load` reads back to equal logits.

        layout: "mistral", "huggingface", "zoo" or another table of names; "auto" is that of the weights' own files.
        file_bytes: beyond this size the weights are several files. overwrite: replace a model that is there.
        The folder holds safetensors in the present dtype, `card.yaml`, the tokenizer's files, and the layout's
        `params.json` or `config.json` where it can say the model. Raises RequestError while adapters are loaded that
        are not merged, for weights that were quantised while they were loaded, and for a folder that is taken;
        WeightsError where the layout cannot name a tensor.
        """
        self._check_whole()
        with self._engine.between_steps() as (adapters, _):
            if adapters.names:
                raise RequestError(
                    "adapters are loaded that are not part of the weights",
                    where=self.card.name,
                    found=", ".join(adapters.names),
                    hint=f"merge them or unload them first: model.merge_adapter({adapters.names[0]!r})",
                )
            weights = Own(self._module) if self._run is None else Gathered(self._run, self._module)
            source = Source(self.plan, weights, self.placement.dtype_name, self._files, self.folder)
            options: dict[str, Any] = {"layout": layout, "file_bytes": file_bytes, "overwrite": overwrite}
            return save(source, folder, progress=progress, **options)

    def _check_whole(self) -> None:
        found = [f"{path} in {matrix.kind.name}" for path, matrix in islice(quantised_parts(self._module), 1)]
        if self._run is not None and self._run.quantize is not None:
            found.append(f"{self._run.quantize} over {self._run}")
        if found:
            raise RequestError(
                "quantised weights are not saved: what they were made from is more exact and not much larger to read",
                where=self.card.name,
                found=found[0],
                hint="load the model without `quantize`, save it, and quantise what was saved when it is loaded",
            )

    # --- prompts ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The raw text's token ids, beginning-of-sequence token first where the tokenizer has one."""
        return self._prompts.encode(text)

    def check_image(self, image: Any) -> None:
        """Raises RequestError or FetchError for an image that the model cannot be shown."""
        self._prompts.media([image])

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        raw: bool = False,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
    ) -> Request:
        """What `generate` sends to the engine for this prompt."""
        return self._prompts.request(prompt, params, raw=raw, images=images, audio=audio)

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End running requests and free weights and cache. The model cannot be used afterwards."""
        self._engine.close()
        # A new module and not `to("meta")`, which does not know of matrices in layouts of their own.
        self._module = assemble(self.plan, self.placement.dtype)
        if self.placement.device.type == "cuda":
            torch.cuda.empty_cache()
        give_back_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Model({self.card.name}, {self.placement.device}, {self.placement.dtype_name})"
