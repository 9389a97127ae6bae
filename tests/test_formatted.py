"""The formatted data set: nothing in the data can break a prompt, and reading back is checked."""

from hypothesis import given
from hypothesis import strategies as st

from stages.model import formatted

MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<image>", "<video>")
pieces = st.sampled_from(
    [*MARKERS, "<", ">", "|", "<|", "|>", "im_end", "image", " ", "<ima", "ge>"]
)
texts = st.lists(pieces | st.text(max_size=4), max_size=12).map("".join)


@given(texts)
def test_only_spaces_are_added_where_there_are_markers(text):
    once = formatted.neutralised(text, MARKERS)
    assert not any(marker in once for marker in MARKERS)
    assert once.replace(" ", "") == text.replace(" ", "")
    assert formatted.neutralised(once, MARKERS) == once
    if not any(marker in text for marker in MARKERS):
        assert once == text


def test_a_marker_that_can_not_be_broken_is_no_endless_loop():
    """Breaking " x" by a space after its first character gives " x" again."""
    assert formatted.neutralised("a<image>b", ("a", "", "<image>")) == "a< image>b"
    markers = (" ", "  ", "\n\n", " x>", "<y ", "a b", "  z")
    text = formatted.neutralised("  <y  x> a b <y x>  z  \n\n", markers)
    assert not any(marker in text for marker in ("<y ", "x>", "a b"))


ids = st.lists(st.text(max_size=8), unique=True, max_size=30)


@given(ids, st.randoms(), st.integers(0, 30), st.integers(0, 30))
def test_a_sample_is_free_of_order_and_a_larger_one_holds_every_smaller(names, random, one, other):
    rows = [{"id": name} for name in names]
    shuffled = random.sample(rows, len(rows))
    small, large = sorted((one, other))
    assert formatted.sample(rows, small) == formatted.sample(shuffled, small)
    assert formatted.sample(rows, large)[:small] == formatted.sample(rows, small)
    assert len(formatted.sample(rows, small)) == min(small, len(rows))
