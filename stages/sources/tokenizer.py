"""A base model's tokenizer, tried on a few texts before anything is loaded.

The tokenizers library alone does it, in a tenth of a second.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.core.errors import UserError

# What LLaMA-Factory's templates of the Qwen families write into every prompt, each one token, and
# the key of config.json that has its id.
TOKENS = {
    "<|im_start|>": None,
    "<|im_end|>": None,
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
TEXT = "Is the cat on the mat?\nNo: 2 dogs, é漢🙂."


def check(folder: Path, there: Collection[str], config: Mapping[str, Any], *, name: str) -> None:
    """Refuse a tokenizer that is broken, or that is not the one of the model in ``config``.

    Raises:
        UserError: saying what does not fit.
    """
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kind = settings.get("tokenizer_class")
    if kind is not None and kind not in CLASSES:
        raise UserError(
            f"{name}: tokenizer_config.json names the class {str(kind)[:100]}, which is not a Qwen "
            "model's; get the tokenizer of this model"
        )
    try:
        special = dict.fromkeys([*_special(settings), *_added(folder, there)])
        # A space can't be broken up in the data, is found in every text, and makes loading hang.
        blank = next((token for token in special if len(token.strip()) < 2), None)
        if blank is None:
            tokenizer = _load(folder, there, settings)
            again = tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False).ids)
    except Exception as error:
        raise _broken(name, error) from None
    except BaseException as error:  # what a panic in Rust becomes is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise _broken(name, error) from None
    if blank is not None:
        raise UserError(
            f"{name}: the tokenizer has the special token {blank!r}, which any text may hold; get "
            "the tokenizer of this model"
        )
    if again.strip() != TEXT:
        raise UserError(
            f"{name}: the tokenizer makes {again[:100]!r} of {TEXT!r}; get the tokenizer of this "
            "model"
        )
    for token, key in TOKENS.items():
        if tokenizer.encode(token, add_special_tokens=False).tokens != [token]:
            raise UserError(
                f"{name}: the tokenizer has no token {token}, so it is not a Qwen vision-language "
                "model's; get the tokenizer of this model"
            )
        wanted = config.get(key) if key else None
        if wanted is not None and tokenizer.token_to_id(token) != wanted:
            raise UserError(
                f"{name}: {token} is number {tokenizer.token_to_id(token)} in the tokenizer, and "
                f"config.json says {key} = {wanted}; get both of one revision"
            )
    for token in special:
        if tokenizer.token_to_id(token) is None:
            raise UserError(
                f"{name}: the special token {token[:100]!r} of tokenizer_config.json is not in the "
                "vocabulary; get the tokenizer of this model"
            )
    size = config.get("text_config", config)["vocab_size"]
    if (largest := max(tokenizer.get_vocab(with_added_tokens=True).values())) >= size:
        raise UserError(
            f"{name}: the tokenizer has a token of number {largest}, and the model's vocab_size is "
            f"{size}; get the tokenizer of this model"
        )


def _broken(name: str, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{name}: the tokenizer can't be loaded ({reason}); get it again")


def _load(folder: Path, there: Collection[str], settings: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if "tokenizer.json" in there:
        return Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    decoder = settings.get("added_tokens_decoder") or {}
    listed = sorted((int(number), entry) for number, entry in decoder.items())
    tokenizer.add_tokens(
        [AddedToken(entry["content"], special=bool(entry.get("special"))) for _, entry in listed]
    )
    return tokenizer


def _added(folder: Path, there: Collection[str]) -> Iterator[str]:
    """The special tokens in tokenizer.json."""
    if "tokenizer.json" in there:
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for token in document.get("added_tokens") or ():
            if token.get("special"):
                yield str(token["content"])


def _special(settings: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that tokenizer_config.json names, in any of the forms that it may."""
    named = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "sep", "pad", "cls")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or ()
        named += listed.values() if isinstance(listed, dict) else listed
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        named += [e for e in decoder.values() if isinstance(e, dict) and e.get("special")]
    for token in named:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content
