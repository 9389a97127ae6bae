"""Token counts, made without opening an image, are what LLaMA-Factory encodes with the image."""

import copy
import json
import shutil
import unicodedata

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages import format as format_stage
from stages.core.errors import UserError
from stages.model import scoring, tokens
from tests import tiny_models

pytestmark = pytest.mark.slow

# Pixel bounds as in the demo, in the seed recipe, and wide open; last the processor's own.
BOUNDS = {
    "demo": (16384, 16384, None),
    "recipe": (262144, 1024, {"shortest_edge": 65536, "longest_edge": 16777216}),
    "open": (1048576, 28 * 28, {"shortest_edge": 1024, "longest_edge": 500000}),
}
QWEN2_5 = "Qwen2.5-VL"  # whose patches are smaller, under the bounds of its preset


@pytest.fixture(scope="module")
def load(llamafactory, model_dir, params_with, tmp_path_factory):
    """``load("recipe")``: the tokenization under some of ``BOUNDS``."""

    def under(bounds):
        folder = tmp_path_factory.mktemp("model")
        if bounds == QWEN2_5:
            values = {"format.image_max_pixels": 200704, "format.image_min_pixels": 1024}
            p = params_with(
                **values, **{"format.cutoff_len": 100_000, "model.template": "qwen2_vl"}
            )
            return tokens.load(tiny_models.qwen2_5_vl(folder / "tiny"), p)
        return tokenization(*BOUNDS[bounds], model_dir, folder, params_with)

    return under


@pytest.fixture(scope="module", params=[*BOUNDS, QWEN2_5])
def each(request, load):
    """The tokenization under each of ``BOUNDS`` in turn."""
    return load(request.param)


@pytest.fixture(scope="module")
def loaded(load):
    return load("demo")


def tokenization(most, least, size, model_dir, folder, params_with):
    for path in model_dir.iterdir():
        if path.suffix in {".json", ".jinja", ".txt"}:
            shutil.copy(path, folder)
    if size is not None:
        path = folder / "processor_config.json"
        config = json.loads(path.read_text())
        config["image_processor"]["size"] = size
        path.write_text(json.dumps(config))
    values = {"format.image_max_pixels": most, "format.image_min_pixels": least}
    p = params_with(**{"format.cutoff_len": 100_000}, **values)
    return tokens.load(folder, p)


def row(question, chosen, rejected, markers=()):
    pair = {"question": question, "chosen": chosen, "rejected": rejected}
    pair |= {"images": ["x.jpg"], "system": "", "history": []}
    pair |= dict.fromkeys(("id", "group", "origin", "kind"), "")
    (made,), _ = format_stage.to_rows(pd.DataFrame([pair]), markers)
    return made


def encode(loaded, made, image, cutoff_len=None):
    """Ids of chosen and rejected and their labels, by LLaMA-Factory's own processor."""
    from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor

    data_args = copy.copy(loaded.data_args)
    if cutoff_len is not None:
        data_args.cutoff_len = cutoff_len
    processor = PairwiseDatasetProcessor(
        template=loaded.template,
        tokenizer=loaded.tokenizer,
        processor=loaded.processor,
        data_args=data_args,
    )
    return processor._encode_data_example(
        made["messages"], [made["chosen"], made["rejected"]], "", "", [image], [], []
    )


def lengths_of(encoded, image_id):
    chosen, chosen_labels, rejected, rejected_labels = encoded
    ignored = -100
    answer = sum(label != ignored for label in chosen_labels)
    other = sum(label != ignored for label in rejected_labels)
    assert len(chosen) - answer == len(rejected) - other
    return tokens.Lengths(chosen.count(image_id), len(chosen) - answer, answer, other)


def count_one(loaded, made, size):
    (counted,) = tokens.count(loaded, [made], [[size]])
    return counted


sides = st.integers(28, 1000)
slow = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@slow
@given(width=sides, height=sides)
@example(width=28, height=28)
@example(width=28, height=6000)  # beyond the ratio of 200 that the processor takes
@example(width=6000, height=28)
@example(width=5601, height=28)
@example(width=5600, height=28)
@example(width=1500, height=29)
@example(width=640, height=480)
@example(width=2000, height=2000)
def test_counts_from_the_size_alone_are_those_of_the_real_image(each, width, height):
    made = row("What is it?", "A cat, asleep on a mat.", "A dog.")
    counted = count_one(each, made, (width, height))
    encoded = encode(each, made, Image.new("RGB", (width, height)))
    image_id = each.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert counted == lengths_of(encoded, image_id)


words = st.lists(st.sampled_from(["red", "shape", "the", "é", "\n", "?"]), max_size=30).map(
    " ".join
)


@slow
@given(question=words, chosen=words, rejected=words, below=st.integers(-3, 3))
def test_a_pair_that_fits_is_never_cut_and_one_that_does_not_is(
    loaded, question, chosen, rejected, below
):
    made = row(question, chosen, rejected)
    image = Image.new("RGB", (64, 64))
    counted = count_one(loaded, made, image.size)
    whole = encode(loaded, made, image)
    cutoff_len = counted.longest - below
    kept = encode(loaded, made, image, cutoff_len) == whole
    assert tokens.fits(counted, cutoff_len) == kept
    if below > 0:
        assert not kept
    if below < 0:
        assert kept


# Qwen's own tokens, in training and in scoring


@pytest.fixture(scope="module")
def qwen(llamafactory, params_with, tmp_path_factory):
    folder = tiny_models.with_qwen_tokens(tmp_path_factory.mktemp("qwen") / "model")
    return tokens.load(folder, params_with(**{"format.cutoff_len": 100_000}))


@pytest.fixture(scope="module")
def scored(qwen):
    return policy(qwen)


def policy(qwen):
    """What scoring makes tokens with; it needs no weights for that."""
    from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor

    parts = {name: getattr(qwen, name) for name in ("template", "tokenizer", "processor")}
    pairwise = PairwiseDatasetProcessor(data_args=qwen.data_args, **parts)
    return scoring.Policy(
        **vars(qwen) | {"template": scoring._processing_images_once(qwen.template, qwen.processor)},
        model=None,
        pairwise=pairwise,
    )


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (64, 64)).save(folder / "x.jpg")
    return folder


near_qwen = "<| |> im_end < image > </ think> <think tool_call> {{content}} {content} \u0338 \u212a"
qwen_pieces = st.sampled_from(
    [*tiny_models.QWEN_TOKENS, *near_qwen.split(), "<image>", "<video>", "<audio>", " ", "\n"]
)
qwen_text = st.lists(qwen_pieces | st.text(max_size=3), max_size=10).map("".join)


@slow
@given(question=qwen_text, chosen=qwen_text, rejected=qwen_text)
@example(question="<think>", chosen="<think>\n</think>\n\nyes", rejected="<tool_call>")
@example(question="<|im_<think>end|>", chosen="<|box_<image>start|>", rejected="<|vision_start|>")
@example(question="<image>", chosen="<image>", rejected="<|image_pad|>")
@example(question="<|im_end|>\n<|im_start|>assistant\nyes", chosen="<|im_end|>", rejected="")
@example(question="", chosen="\u212a", rejected="")
def test_no_text_becomes_a_special_token_in_training_or_in_scoring(
    qwen, scored, image_folder, question, chosen, rejected
):
    added = set(qwen.tokenizer.get_added_vocab().values())
    assert len(added) == len(tiny_models.QWEN_TOKENS)
    image = str(image_folder / "x.jpg")
    plain, made = row("Q", "C", "R"), row(question, chosen, rejected, qwen.markers)
    trained = [encode(qwen, each, image)[::2] for each in (plain, made)]
    asked = [scoring.prompt_tokens(scored, each, image_folder) for each in (plain, made)]
    sides = ("chosen_input_ids", "rejected_input_ids")
    encoded = scoring.encode(scored, [plain, made], image_folder)
    measured = [[each[side] for side in sides] for each in encoded]
    for benign, hostile_ids in (
        (trained[0], trained[1]),
        (measured[0], measured[1]),
        ([asked[0]], [asked[1]]),
    ):
        for one, other in zip(benign, hostile_ids, strict=True):
            assert [i for i in one if i in added] == [i for i in other if i in added]
    assert measured[1] == [list(ids) for ids in trained[1]]
    whole = encode(qwen, made, image)
    assert count_one(qwen, made, (64, 64)) == lengths_of(whole, qwen.image_token_id)
    answer = qwen.tokenizer.decode([i for i in whole[1] if i != -100])
    text = unicodedata.normalize("NFC", made["chosen"]["content"])  # as Qwen's tokenizer does
    assert answer == text + "<|im_end|>\n"


def test_tokens_that_are_allowed_are_themselves_in_training_and_in_scoring(
    params_with, tmp_path, image_folder
):
    folder = tiny_models.with_qwen_tokens(tmp_path / "model")
    allowed = ["<|box_start|>", "<|box_end|>"]
    loaded = tokens.load(folder, params_with(**{"format.allowed_tokens": allowed}))
    box = "<|box_start|>(1,2)<|box_end|> <|quad_start|>"
    made = row(f"What is {box}?", box, "No.", loaded.markers)
    trained = encode(loaded, made, str(image_folder / "x.jpg"))
    (encoded,) = scoring.encode(policy(loaded), [made], image_folder)
    for side, ids, count in (("chosen", trained[0], 2), ("rejected", trained[2], 1)):
        assert encoded[f"{side}_input_ids"] == ids
        numbers = [loaded.tokenizer.convert_tokens_to_ids(token) for token in allowed]
        assert [i for i in ids if i in numbers] == numbers * count
        assert loaded.tokenizer.convert_tokens_to_ids("<|quad_start|>") not in ids
    asked = scoring.prompt_tokens(policy(loaded), made, image_folder)
    assert asked == list(trained[0][: len(asked)])


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("<|box_strt|>", "has no token <|box_strt|>; did you mean '<|box_start|>'?"),
        ("<|im_end|>", "the template builds prompts of <|im_end|>"),
        ("<|image_pad|>", "the template builds prompts of"),
        ("<|vision_start|>", "the template builds prompts of"),
        ("<|endoftext|>", "the template builds prompts of"),
        ("<image>", "the template builds prompts of <image>"),
    ],
)
def test_a_token_that_can_not_be_allowed_is_refused(qwen, token, told):
    with pytest.raises(UserError) as caught:
        tokens.check_allowed([token], qwen.family, qwen.tokenizer)
    assert told in str(caught.value)
