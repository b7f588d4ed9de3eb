"""The definition of the window, of documents, padding, sinks and positions, against plain loops."""

from typing import Any

import pytest
import torch

from windowlm.attention.backends import flex
from windowlm.attention.dispatch import attention
from windowlm.attention.document_layout import positions_in_documents
from windowlm.attention.window import Visibility, check_window

CPU = torch.device("cpu")


def visible_by_loop(
    tokens: int, window: int | None, causal: bool, sinks: int, documents: list[int]
) -> list[list[bool]]:
    """The definition in words, token by token, for documents that stand together."""
    rows = []
    for query in range(tokens):
        row = []
        for key in range(tokens):
            same = documents[query] == documents[key] != -1
            past = query >= key or not causal
            near = window is None or abs(query - key) < window
            sink = key - documents.index(documents[key]) < sinks
            row.append(same and past and (near or sink))
        rows.append(row)
    return rows


@pytest.mark.parametrize("window", [1, 2, 3, 7, None])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("documents", [[0] * 7, [0, 0, 0, 1, 1, 1, 1], [-1, -1, 3, 3, 5, -1, -1]])
def test_the_mask_is_the_definition(
    window: int | None, causal: bool, sinks: int, documents: list[int]
) -> None:
    visibility = Visibility.build(
        window=window,
        causal=causal,
        sinks=sinks,
        documents_BT=torch.tensor([documents], dtype=torch.int32),
    )
    assert visibility.mask(7, 7, CPU)[0].tolist() == visible_by_loop(7, window, causal, sinks, documents)


def test_a_query_sees_as_many_keys_as_the_window_says_itself_included() -> None:
    seen = Visibility.build(window=4).mask(10, 10, CPU)[0].sum(-1)
    assert seen.tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]


def test_queries_are_the_last_of_more_keys() -> None:
    whole = Visibility.build(window=3).mask(9, 9, CPU)[0]
    last = Visibility.build(window=3).mask(2, 9, CPU)[0]
    assert torch.equal(last, whole[-2:])


def test_keys_with_positions_of_their_own_may_stand_in_any_order() -> None:
    order = torch.tensor([4, 2, 0, 1, 3])
    whole = Visibility.build(window=2).mask(5, 5, CPU)
    visibility = Visibility.build(window=2, positions_BT=torch.arange(5)[None], key_positions_BS=order[None])
    assert torch.equal(visibility.mask(5, 5, CPU), whole[:, :, order])


def test_positions_may_be_further_apart_than_32_bits_hold() -> None:
    visibility = Visibility.build(
        window=4,
        positions_BT=torch.tensor([[2**31 - 1]], dtype=torch.int32),
        key_positions_BS=torch.tensor([[-(2**31), -1, 2**31 - 3]], dtype=torch.int32),
    )
    assert visibility.mask(1, 3, CPU).tolist() == [[[False, False, True]]]


def test_keys_before_the_first_position_are_no_sinks() -> None:
    positions_BS = torch.arange(-3, 7)[None]
    visibility = Visibility.build(
        window=2, sinks=2, positions_BT=positions_BS[:, 9:], key_positions_BS=positions_BS
    )
    # Positions 0 and 1 stand at places 3 and 4.
    assert visibility.mask(1, 10, CPU)[0, 0].nonzero()[:, 0].tolist() == [3, 4, 8, 9]
    index, zero = torch.arange(10), torch.zeros((), dtype=torch.int64)
    seen_by_flex = flex._sees(visibility, 1, 10, CPU)(zero, zero, zero, index)
    assert torch.equal(seen_by_flex, visibility.mask(1, 10, CPU)[0, 0])


def test_positions_below_zero_are_refused_beside_sinks() -> None:
    positions_BT = torch.arange(-3, 7)[None]
    with pytest.raises(ValueError, match="positions_BT is below 0 at row 0, token 0: sinks stand at pos"):
        Visibility.build(window=2, sinks=2, positions_BT=positions_BT)
    documents_BT = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, 0, 0, 0]])
    seen = Visibility.build(window=2, sinks=2, positions_BT=positions_BT, documents_BT=documents_BT)
    assert seen.mask(10, 10, CPU)[0, 9].nonzero()[:, 0].tolist() == [3, 4, 8, 9]
    assert Visibility.build(window=2, positions_BT=positions_BT).mask(10, 10, CPU)[0, 9].sum() == 2


def test_a_visibility_is_not_built_within_vmap() -> None:
    documents = torch.zeros(2, 1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"documents_BT is mapped by torch\.func\.vmap: build"):
        torch.func.vmap(lambda each: Visibility.build(window=2, documents_BT=each).mask(4, 4, CPU))(documents)


def test_a_mask_is_padding_and_joins_the_documents() -> None:
    mask_BT = torch.tensor([[True, True, True, False]])
    documents_BT = torch.tensor([[0, 1, 1, 1]], dtype=torch.int32)
    visibility = Visibility.build(window=None, documents_BT=documents_BT, mask_BT=mask_BT)
    assert visibility.mask(4, 4, CPU)[0].int().tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]


def test_positions_restart_at_documents_and_count_padding_inside() -> None:
    documents_BT = torch.tensor([[-1, 0, 0, -1, 0, 2, 2], [7, 7, 8, 8, 8, -1, -1]])
    positions_BT = positions_in_documents(documents_BT)
    token_BT = documents_BT != -1
    assert positions_BT[token_BT].tolist() == [0, 1, 3, 0, 1, 0, 1, 0, 1, 2]


def test_work_named_once_is_done_once() -> None:
    visibility = Visibility.build(window=3)
    assert visibility.once("work", object) is visibility.once("work", object)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "8", float("nan")])
def test_bad_windows_are_refused_by_name(window: object) -> None:
    with pytest.raises(ValueError, match=r"^window=.*; try window=512$"):
        check_window(window)


def test_no_visibility_holds_numbers_that_are_out_of_range() -> None:
    wrong: Any
    for wrong in (0, -1, 2.5, True):
        for make in (Visibility, Visibility().with_window):
            with pytest.raises(ValueError, match=f"^window={wrong}: "):
                make(window=wrong)
    with pytest.raises(ValueError, match=r"^sinks=1\.5: "):
        Visibility(sinks=1.5)  # type: ignore[arg-type]


def test_bad_batches_are_refused_with_the_argument_named() -> None:
    documents_BT = torch.tensor([[0, 1, 1, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="documents_BT decreases at row 0, token 3"):
        Visibility.build(window=2, documents_BT=documents_BT)
    with pytest.raises(ValueError, match="documents_BT holds -2"):
        Visibility.build(window=2, documents_BT=documents_BT - 2)
    with pytest.raises(ValueError, match="documents_BT has shape"):
        Visibility.build(window=2, documents_BT=documents_BT[0])
    with pytest.raises(ValueError, match=r"documents_BT has dtype torch\.float32"):
        Visibility.build(window=2, documents_BT=documents_BT.float())
    with pytest.raises(ValueError, match="documents_BT has no rows"):
        Visibility.build(window=2, documents_BT=documents_BT[:0])
    with pytest.raises(ValueError, match=r"mask_BT has dtype torch\.float32"):
        Visibility.build(window=2, mask_BT=torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="positions_BT does not advance by one a token at row 0, token 2"):
        Visibility.build(window=2, positions_BT=torch.tensor([[0, 1, 0, 1]]))
    for sparse in (
        documents_BT.to_sparse(),
        torch.nested.nested_tensor([documents_BT[0], documents_BT[0, :1]], layout=torch.jagged),
    ):
        with pytest.raises(ValueError, match="documents_BT is sparse or nested"):
            Visibility.build(window=2, documents_BT=sparse)
    for batch in (0, 2.0, 3):
        with pytest.raises(ValueError, match=f"^batch={batch}: .*; try batch="):
            Visibility.build(window=2, documents_BT=torch.zeros(2, 4, dtype=torch.int32)).prepare(batch)  # type: ignore[arg-type]
    one, zeros = torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    for name, of_query, of_keys in (("documents_BT", -7, 0), ("key_documents_BS", 0, -2)):
        with pytest.raises(ValueError, match=f"^{name} holds {of_query + of_keys}: "):
            Visibility.build(
                window=2,
                positions_BT=one,
                documents_BT=of_query * one,
                key_positions_BS=zeros,
                key_documents_BS=zeros + of_keys,
            )
    with pytest.raises(ValueError, match="documents_BT is a list"):
        Visibility.build(window=2, documents_BT=[[0, 1]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sinks=-1"):
        Visibility.build(window=2, sinks=-1)
    with pytest.raises(ValueError, match="key_positions_BS without positions_BT"):
        Visibility.build(window=2, key_positions_BS=torch.arange(3)[None])
    with pytest.raises(ValueError, match="causal='no': True or False"):
        Visibility.build(window=2, causal="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="documents_BT is on meta, mask_BT on cpu"):
        Visibility.build(window=2, documents_BT=documents_BT.to("meta"), mask_BT=documents_BT > 0)
    positions = torch.arange(6).expand(3, -1)
    with pytest.raises(ValueError, match="key_positions_BS has 3 rows, positions_BT 2"):
        Visibility.build(window=2, positions_BT=positions[:2, :4], key_positions_BS=positions)


def test_a_call_of_another_shape_is_refused() -> None:
    visibility = Visibility.build(window=2, documents_BT=torch.zeros(2, 4, dtype=torch.int32))
    visibility.check_call(2, 4, 4, CPU)
    with pytest.raises(ValueError, match="documents_BT describes 2 rows, the call has 3"):
        visibility.check_call(3, 4, 4, CPU)
    with pytest.raises(ValueError, match="documents_BT is on cpu, the call on meta"):
        visibility.check_call(2, 4, 4, torch.device("meta"))
    with pytest.raises(ValueError, match="5 keys for 4 queries with documents"):
        visibility.check_call(2, 4, 5, CPU)
    with pytest.raises(ValueError, match="documents_BT has length 4, the call has 5"):
        visibility.mask(5, 5, CPU)
    with pytest.raises(ValueError, match="3 keys for 4 queries"):
        Visibility.build(window=2).mask(4, 3, CPU)


@pytest.mark.parametrize("documents", [None, [0] * 7, [0, 0, 0, 1, 1, 2, 2], [-1, 3, 3, -1, 3, 5, -1]])
def test_behind_a_token_stand_those_of_its_document_up_to_the_nearest_padding(
    documents: list[int] | None,
) -> None:
    documents_BT = None if documents is None else torch.tensor([documents], dtype=torch.int32)
    expected = []
    for place in range(7):
        start = place
        while start and (documents is None or documents[start - 1] == documents[place]):
            start -= 1
        expected.append(place - start)
    behind_BT = Visibility.build(window=3, documents_BT=documents_BT).behind(7, CPU)
    assert behind_BT.tolist() == [expected]


def test_behind_is_unknown_for_keys_in_another_order() -> None:
    positions_BT = torch.arange(3)[None]
    visibility = Visibility.build(window=3, positions_BT=positions_BT, key_positions_BS=positions_BT)
    with pytest.raises(ValueError, match="key_positions_BS"):
        visibility.behind(3, CPU)


@pytest.mark.parametrize("size", [2**31, 2**63 - 1, 10**30])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_or_sinks_beyond_every_number_of_a_kernel_are_full_attention(
    size: int, causal: bool
) -> None:
    torch.manual_seed(0)
    heads = torch.randn(1, 9, 1, 8)
    documents_BT = torch.tensor([[0] * 4 + [1] * 5])
    ring = {"positions_BT": torch.arange(9)[None].int(), "key_positions_BS": torch.arange(9)[None].int()}
    for others in ({}, {"documents_BT": documents_BT}, ring):
        full = Visibility.build(window=None, causal=causal, **others)
        wide = Visibility.build(window=size, causal=causal, **others)
        narrow = Visibility.build(window=2, sinks=size, causal=causal, **others)
        wanted = attention(heads, heads, heads, full, backend="reference")
        for visibility in (wide, narrow):
            for backend in ("banded", "reference"):
                got = attention(heads, heads, heads, visibility, backend=backend)
                torch.testing.assert_close(got, wanted)
        if not others:
            for got, exact in zip(
                wide.bounds(9, 9, heads.device), full.bounds(9, 9, heads.device), strict=True
            ):
                assert torch.equal(got, exact)


def test_a_mask_of_another_size_is_refused_whatever_was_asked_before() -> None:
    visibility = Visibility.build(window=2, documents_BT=torch.tensor([[0, 0, 1, 1]]))
    device = torch.device("cpu")
    assert visibility.mask(4, 4, device).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="documents_BT"):
        visibility.mask(3, 3, device)


def test_documents_of_queries_must_not_decrease_beside_keys_of_their_own_positions() -> None:
    places = torch.tensor([[0, 1]])
    documents = torch.tensor([[1, 0]])
    with pytest.raises(ValueError, match="documents_BT decreases at row 0, token 1"):
        Visibility.build(
            window=3,
            positions_BT=places,
            documents_BT=documents,
            key_positions_BS=places,
            key_documents_BS=documents,
        )
