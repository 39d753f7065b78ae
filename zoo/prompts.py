"""What callers write becomes the engine's requests: texts, token ids, messages, and the images that belong to them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from zoo import hearing
from zoo.asking import check_switches
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.vision.spec import PixtralSpec
from zoo.engine.request import Media, Request, SamplingParams
from zoo.images.messages import with_pictures
from zoo.images.picture import Picture, pictures
from zoo.registry.errors import RequestError, TextError
from zoo.registry.plan import Plan
from zoo.registry.training import check_trained
from zoo.text.tokenizer import NO_OPTIONS, Tokenizer
from zoo.text.tokenizer import Prompt as Rendered

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
Images = Sequence[Any]

VISION = "vision"
SOUNDS = ("sound", "audio")
"""What they are called, and the option by which they are given."""


class Prompts:
    """Of one model. tokenizer: or why there is none, which is raised where text needs it."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer | TextError) -> None:
        self.card, self._plan, self._tokenizer = plan.card, plan, tokenizer
        self._vision = _vision(plan)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None if isinstance(self._tokenizer, TextError) else self._tokenizer

    def text(self) -> Tokenizer:
        """The tokenizer. Raises TextError where there is none."""
        if isinstance(self._tokenizer, TextError):
            raise self._tokenizer
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """The raw text's token ids, beginning-of-sequence token first where the tokenizer has one."""
        return self.text().encode(text)

    def media(self, images: Images | None, audio: Sequence[Any] = ()) -> list[Media]:
        """Images and sounds as the encoders take them, for a prompt of token ids."""
        return [*_shown(self._pictures(images)), *hearing.beside_ids(several(audio, *SOUNDS), self._plan)]

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        raw: bool = False,
        images: Images = (),
        audio: Sequence[Any] = (),
    ) -> Request:
        """The request of one prompt; images and sounds go before a text, and where a list of ids has their tokens."""
        check_switches(raw=raw)
        audio = several(audio, *SOUNDS)
        if audio:
            hearing.encoder_of(self._plan)
        if isinstance(prompt, str):
            if raw or "chat" not in self.card.text.features:
                return self._raw(prompt, params, images, audio)
            prompt, audio = [hearing.user_message(prompt, audio)], ()
        check_prompt(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            hearing.refuse_loose(audio)
            return self.chat(cast("Sequence[Message]", prompt), params, images=images)
        ids = cast("Sequence[int]", prompt)
        return Request(ids, params, self.tokenizer, continues=True, media=self.media(images, audio))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        images: Images = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] = NO_OPTIONS,
        **form: bool,
    ) -> Request:
        """The request of a conversation; `form` as `Tokenizer.render` has it."""
        return self._rendered(self.render(messages, images=images, tools=tools, options=options, **form), params)

    def transcription(self, sound: Any, language: str | None, params: SamplingParams) -> Request:
        """The request for what is said in a sound. Raises RequestError for a model that does not hear."""
        hearing.encoder_of(self._plan)
        return self._rendered(self.text().transcription(sound, language), params)

    def _rendered(self, prompt: Rendered, params: SamplingParams) -> Request:
        form = prompt.form
        if "thinking" not in self.card.text.features:
            form = replace(form, thinking=False, begun=False)
        media = [*_shown(prompt.images), *hearing.of_prompt(prompt.sounds, self._plan)]
        return Request(prompt.ids, params, self.tokenizer, continues=prompt.continues, form=form, media=media)

    def render(self, messages: Sequence[Message], *, images: Images = (), **form: Any) -> Rendered:
        """The conversation as token ids, with its pictures; `form` as `Tokenizer.render` has it."""
        check_switches(**{name: form[name] for name in ("continue_final", "merge") if name in form})
        if self._vision is None:
            self._pictures(images)
        elif not isinstance(messages, str | Mapping):
            messages = with_pictures(messages, images, self._vision)
        return self.text().render(messages, **form)

    def fill(self, prefix: str, suffix: str, params: SamplingParams) -> Request:
        """The request for the text between two. Raises RequestError when the card does not list the feature `fim`."""
        check_trained(self.card, "fim")
        return Request(self.text().fill(prefix, suffix), params, self.tokenizer, continues=True)

    def _raw(self, text: str, params: SamplingParams, images: Images, audio: Sequence[Any]) -> Request:
        shown = self._pictures(images)
        ids = self.text().show(shown, text).ids if shown else self.encode(text)
        media = [*_shown(shown), *hearing.beside_ids(audio, self._plan)]
        return Request(ids, params, self.tokenizer, continues=True, media=media)

    def _pictures(self, images: Images | None) -> list[Picture]:
        listed = several(images)
        return pictures(listed, vision_of(self._plan, len(listed))) if listed else []


def vision_of(plan: Plan, count: int) -> PixtralSpec:
    """The model's encoder of images, of which so many are given. Raises RequestError for a model without one."""
    encoder = _vision(plan)
    if encoder is None:
        raise RequestError(
            "this model does not read images",
            where=plan.card.name,
            found=f"{count} image(s)",
            expected="text or token ids",
            hint="`zoo list` shows which cards have the feature vision",
        )
    return encoder


def _vision(plan: Plan) -> PixtralSpec | None:
    encoder = plan.model.vision if isinstance(plan.model, DecoderSpec) else None
    return encoder if isinstance(encoder, PixtralSpec) else None


def _shown(pictures: Sequence[Picture]) -> list[Media]:
    return [Media(VISION, picture.prepared()) for picture in pictures]


def several(given: Any, what: str = "image", option: str = "images") -> list[Any]:
    """The images or sounds of one prompt as a list. Raises RequestError for what is no list, such as one alone."""
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        found, expected = type(given).__name__, f"[{what}, ...]"
        raise RequestError(f"{what}s are given as a list", where=option, found=found, expected=expected)
    return [*given]


def separate(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a text, a list of ids and a list of messages are one."""
    if isinstance(prompts, str):
        return [prompts]
    check_prompt(prompts)
    if prompts and isinstance(prompts[0], int | Mapping):
        return [cast("Prompt", prompts)]
    return [*cast("Sequence[Prompt]", prompts)]


def shared_out(images: Any, prompts: Prompt | Sequence[Prompt], count: int) -> list[list[Any]]:
    """Each prompt's images: all of them for one prompt, and a list of lists for several.

    Raises RequestError for one list of images beside several prompts.
    """
    listed = several(images)
    alone = separate(prompts) == [prompts]
    if not listed:
        return [[] for _ in range(count)]
    if alone or (count == 1 and not isinstance(listed[0], list | tuple)):
        return [listed]
    if len(listed) != count or not all(item is None or isinstance(item, list | tuple) for item in listed):
        raise RequestError(
            "several prompts need a list of images for each",
            where="images",
            found=f"{len(listed)} items for {count} prompts",
            expected="[[image, ...], [], ...], one list for each prompt",
        )
    return [several(item) for item in listed]


def check_prompt(prompt: object) -> None:
    """Refuse what is no sequence; bytes are one, of numbers that would pass for token ids."""
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise RequestError(
            "not a prompt",
            where="prompts",
            found=type(prompt).__name__,
            expected="a text, a list of token ids or of messages, or a list of these",
            hint="`.tolist()` makes a list of it" if hasattr(prompt, "tolist") else None,
        )
