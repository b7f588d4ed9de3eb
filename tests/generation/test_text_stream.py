"""Bytes to text as they come."""

from hypothesis import given
from hypothesis import strategies as st

from windowlm.generation.text_stream import TextStream

cuts = st.lists(st.integers(1, 4), min_size=1)
# Characters of one to four bytes, so that cuts fall inside.
texts = st.text(st.sampled_from("abñ€😀"), max_size=30)


def streamed(data: bytes, sizes: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    stream, pieces, start = TextStream(stop), [], 0
    while start < len(data):
        for size in sizes:
            pieces.append(stream.add(data[start : start + size]))
            start += size
    pieces.append(stream.add(b"", final=True))
    return pieces, stream


@given(st.one_of(st.binary(max_size=40), texts.map(str.encode)), cuts)
def test_pieces_are_what_one_decoding_gives(data: bytes, sizes: list[int]) -> None:
    pieces, stream = streamed(data, sizes, [])
    assert "".join(pieces) == stream.text == data.decode("utf-8", errors="replace")


@given(texts, cuts, st.lists(st.text(st.sampled_from("abñ"), min_size=1, max_size=3), max_size=3))
def test_the_stream_ends_before_the_first_stop_text(text: str, sizes: list[int], stop: list[str]) -> None:
    pieces, stream = streamed(text.encode(), sizes, stop)
    # Of stop texts that overlap, the one that is complete first ends the text.
    found = [(text.find(end) + len(end), text.find(end)) for end in stop if end in text]
    assert "".join(pieces) == stream.text
    assert stream.stopped is bool(found)
    assert stream.text == (text[: min(found)[1]] if found else text)
    assert not any(end in stream.text for end in stop)


def test_whole_characters_are_given_at_once_and_cut_ones_held() -> None:
    stream = TextStream(["STOP"])
    assert [stream.add(bytes([byte])) for byte in "é!".encode()] == ["", "é", "!"]
    assert stream.add(b"a ST") == "a "
    assert stream.add(b"AY") == "STAY"
    assert stream.add(b" STO") == " "
    assert stream.add(b"P and more") == ""
    assert stream.stopped
    assert stream.add(b"nothing") == ""
    assert stream.text == "é!a STAY "
