"""Tokens of prompts and answers, made by LLaMA-Factory's template on the model's own processor."""

import copy
import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core import console
from stages.core.errors import UserError, did_you_mean
from stages.families import known
from stages.families.family import Family
from stages.model import formatted
from stages.model.formatted import PLACEHOLDERS
from stages.params.params import Params


@dataclass(frozen=True)
class Tokenization:
    """What LLaMA-Factory loads before a model: arguments, tokenizer, processor, template."""

    family: Family
    model_args: Any
    data_args: Any
    finetuning_args: Any
    tokenizer: Any
    processor: Any
    template: Any
    allowed: tuple[str, ...]

    @property
    def markers(self) -> list[str]:
        """Strings of the data that must not reach the tokenizer: added tokens and placeholders.

        Tokens that are not marked special, such as <think> and <tool_call>, are found in any text
        just as well. Those that ``format.allowed_tokens`` names are meant as what they are.
        """
        return sorted((_added(self.tokenizer) | set(PLACEHOLDERS)) - set(self.allowed))

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.family.image_token))


@dataclass(frozen=True)
class Lengths:
    """Token counts of one pair; ``image`` is those of all its images, ``prompt`` includes them."""

    image: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def longest(self) -> int:
        """Tokens of the longer of the pair's two sequences."""
        return self.prompt + max(self.chosen, self.rejected)


def load(model_dir: Path, p: Params, **more: Any) -> Tokenization:
    """Load tokenizer, processor and template as ``llamafactory-cli`` does for the same parameters.

    ``more`` are further arguments of LLaMA-Factory, for callers that also load the model.

    Raises:
        UserError: the model is of no known family, ``model.template`` is of another one, or
            ``format.allowed_tokens`` names what is no token or builds the prompt.
    """
    family = known.of_model(model_dir)
    # LLaMA-Factory takes any template, and a model does not say that its prompts are another's.
    if p.model.template not in family.templates:
        raise UserError(
            f"model.template is {p.model.template}, but the model is a {family.name}; set it to "
            f"{' or '.join(family.templates)}"
        )
    # Else LLaMA-Factory prints the tokenizer's files and every argument, for each of the stages.
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, finetuning_args, _ = get_infer_args(
        {
            "model_name_or_path": str(model_dir),
            "trust_remote_code": p.model.trust.remote_code,
            "template": p.model.template,
            "cutoff_len": p.format.cutoff_len,
            "image_max_pixels": p.format.image_max_pixels,
            "image_min_pixels": p.format.image_min_pixels,
            **more,
        }
    )
    module = load_tokenizer(model_args)  # tokenizer and processor
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    check_allowed(p.format.allowed_tokens, family, module["tokenizer"])
    return Tokenization(
        family=family,
        model_args=model_args,
        data_args=data_args,
        finetuning_args=finetuning_args,
        template=template,
        allowed=tuple(p.format.allowed_tokens),
        **module,
    )


def _added(tokenizer: Any) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(
        tokenizer.all_special_tokens
    )


def check_allowed(allowed: Iterable[str], family: Family, tokenizer: Any) -> None:
    """Refuse what ``format.allowed_tokens`` may not name.

    Raises:
        UserError: the tokenizer has no such token, or the template builds prompts of it.
    """
    added = _added(tokenizer)
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    for token in allowed:
        if token in ends or token in PLACEHOLDERS or re.match(family.builds_prompts, token):
            raise UserError(
                f"format.allowed_tokens: the template builds prompts of {token}, so in the data it "
                "would end a turn or ask for an image; take it out"
            )
        if token not in added:
            raise UserError(
                f"format.allowed_tokens: the model's tokenizer has no token {token}"
                + did_you_mean(token, added)
            )


def count(
    tokens: Tokenization, rows: Sequence[dict[str, Any]], sizes: Iterable[Sequence[tuple[int, int]]]
) -> list[Lengths]:
    """Tokens of formatted pairs, without opening their images.

    The template is applied with one token in the place of each image; how many there will be
    follows from ``sizes`` (width and height in pixels of a pair's images) alone.
    """
    plugin = copy.copy(tokens.template.mm_plugin)
    plugin.expand_mm_tokens = False

    @functools.cache
    def of_image(size: tuple[int, int]) -> int:
        return tokens.family.image_tokens(
            size,
            image_processor=tokens.processor.image_processor,
            plugin=plugin,
            bounds=(tokens.model_args.image_min_pixels, tokens.model_args.image_max_pixels),
        )

    counted = []
    for row, of_pair in zip(
        console.counted(rows, len(rows), "format", "pairs"), sizes, strict=True
    ):
        messages = plugin.process_messages(
            [*formatted.turns(row), row["chosen"], row["rejected"]],
            row["images"],
            [],
            [],
            tokens.processor,
        )
        *asked, first, second = messages
        said = formatted.system(row)
        prompt, chosen = tokens.template.encode_oneturn(tokens.tokenizer, [*asked, first], said)
        _, rejected = tokens.template.encode_oneturn(tokens.tokenizer, [*asked, second], said)
        images = sum(of_image(size) for size in of_pair)
        prompt_length = len(prompt) - len(of_pair) + images
        counted.append(Lengths(images, prompt_length, len(chosen), len(rejected)))
    return counted


def fits(lengths: Lengths, cutoff_len: int) -> bool:
    """Whether LLaMA-Factory leaves the pair whole at ``cutoff_len``; its own rule decides."""
    from llamafactory.data.processor.processor_utils import infer_seqlen

    whole = lengths.prompt, max(lengths.chosen, lengths.rejected)
    return bool(infer_seqlen(*whole, cutoff_len) == whole)
