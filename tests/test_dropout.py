"""Stream dropout: the same masks for any number of ranks, and otherwise what `torch.nn.Dropout` does."""

import threading

import pytest
import torch
from torch import nn

from mtrec.dropout import Dropout, keep_mask, stream_dropout, without_dropout

ROWS = (5, 0, 3, 4, 1, 2, 6, 4)  # of 8 streams, one of which has none in this batch


def split_over(world_size: int) -> list[list[int]]:
    """The streams of each rank: rank r owns stream v where v * W // V = r."""
    return [[v for v in range(len(ROWS)) if v * world_size // len(ROWS) == r] for r in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("row_dim", [0, 1])
def test_masks_do_not_depend_on_the_number_of_ranks(world_size, row_dim):
    x = torch.randn(sum(ROWS), 3, 16)
    layers = nn.ModuleList([Dropout(0.3), Dropout(0.6)])

    def run(streams):
        rows = [ROWS[v] for v in streams]
        mine = torch.cat([part for v, part in enumerate(x.split(ROWS)) if v in streams])
        with stream_dropout(11, 4, streams, rows):
            for layer in layers:
                mine = layer(mine.transpose(0, row_dim), row_dim=row_dim).transpose(0, row_dim)
        return mine

    whole = run(range(len(ROWS)))
    torch.testing.assert_close(torch.cat([run(s) for s in split_over(world_size)]), whole, rtol=0, atol=0)
    assert 0.1 < (whole == 0).float().mean() < 0.95


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("streamed", [True, False])
def test_share_dropped_and_scale(p, streamed):
    torch.manual_seed(0)
    x = torch.ones(1000, 64)
    if streamed:
        with stream_dropout(0, 0, [0, 1], [400, 600]):
            y = Dropout(p)(x)
    else:
        y = Dropout(p)(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / (1 - p)]))
    standard_error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((y == 0).float().mean().item() - p) < 5 * standard_error


def test_backward_is_the_mask_times_the_scale():
    x = torch.randn(8, 32, requires_grad=True)
    with stream_dropout(0, 0, [3], [8]):
        y = Dropout(0.4)(x)
    weight = torch.randn(8, 32)
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight * (y != 0) / 0.6)


def test_masks_differ_between_seeds_steps_streams_and_layers_and_repeat_otherwise():
    def mask(seed, step, stream, layer=0):
        with stream_dropout(seed, step, [stream], [100]):
            return [keep_mask((100, 100), 0.5, row_dim=0, device=torch.device("cpu")) for _ in range(layer + 1)][-1]

    first = mask(0, 1, 2)
    assert torch.equal(first, mask(0, 1, 2))
    for other in (mask(1, 1, 2), mask(0, 2, 2), mask(0, 1, 3), mask(1, 0, 2), mask(2, 1, 0), mask(0, 1, 2, layer=1)):
        # 10,000 fair coins: independent masks agree on half of them, with a standard error of 0.005
        assert abs((first == other).float().mean().item() - 0.5) < 0.025


def test_outside_of_the_context_it_is_torch_dropout():
    x = torch.randn(50, 20)
    torch.manual_seed(5)
    ours = Dropout(0.25)(x)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, nn.Dropout(0.25)(x), rtol=0, atol=0)


def test_identity_in_eval_without_probability_and_within_without_dropout():
    x = torch.randn(4, 4)
    state = torch.get_rng_state()
    with stream_dropout(0, 0, [0], [4]):
        assert Dropout(0.5).eval()(x) is x
        assert Dropout(0.0)(x) is x
        with without_dropout():
            assert Dropout(0.5)(x) is x
            assert keep_mask((4, 4), 0.5, row_dim=0, device=x.device) is None
    assert torch.equal(state, torch.get_rng_state())


def test_looking_without_dropout_leaves_the_following_masks_alone():
    x, layer = torch.ones(4, 50), Dropout(0.5)
    with stream_dropout(0, 0, [0], [4]):
        expected = layer(x)
    with stream_dropout(0, 0, [0], [4]):
        with without_dropout():
            layer(x)
        assert torch.equal(layer(x), expected)


def test_type_is_kept_and_zero_rows_work():
    with stream_dropout(0, 0, [0, 1], [0, 0]):
        y = Dropout(0.5)(torch.empty(0, 3, dtype=torch.bfloat16))
    assert y.shape == (0, 3)
    assert y.dtype == torch.bfloat16
    with stream_dropout(0, 0, [], []):
        assert Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)


def test_masks_are_the_same_in_bf16_as_in_fp32():
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        with stream_dropout(0, 0, [0], [64]):
            kept.append(Dropout(0.5)(torch.ones(64, 64, dtype=dtype)) != 0)
    assert torch.equal(*kept)


def test_another_thread_is_outside_of_the_context():
    found = []
    with stream_dropout(0, 0, [0], [4]):
        thread = threading.Thread(target=lambda: found.append(Dropout(0.5)(torch.ones(7, 2)).shape))
        thread.start()
        thread.join()
    assert found == [(7, 2)]  # 7 rows do not fit the 4 of the stream


def test_context_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), stream_dropout(0, 0, [0], [4]):
        raise ZeroDivisionError
    assert Dropout(0.5)(torch.ones(7, 2)).shape == (7, 2)


def test_errors_name_the_place():
    with (
        stream_dropout(0, 0, [0, 1], [2, 3]),
        pytest.raises(ValueError, match=r"`rows` of stream_dropout should sum to the 4 rows"),
    ):
        Dropout(0.5)(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"`rows` should have one number a stream\. Found 1 for 2"), stream_dropout(
        0, 0, [0, 1], [2]
    ):
        pass
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="`dropout` should be at least 0 and less than 1"):
            Dropout(p)
