"""Products of batches by oneDNN: the values of the formula in full precision, and no setting of torch left changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import batched as module
from ops.batched import batched_product, onednn_is_exact


@pytest.fixture
def forget():
    onednn_is_exact.cache_clear()
    yield
    onednn_is_exact.cache_clear()


@settings(max_examples=60)
@given(
    batch=st.integers(0, 5),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    transposed=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from([1.0, 0.125, -3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_are_those_of_the_formula(batch, sizes, transposed, scale, dtype):
    torch.manual_seed(0)
    n, k, m = sizes
    a, b = (
        torch.randn(batch, columns, rows, dtype=dtype).transpose(1, 2) if turned else torch.randn(batch, rows, columns)
        for rows, columns, turned in ((n, k, transposed[0]), (k, m, transposed[1]))
    )
    a, b = a.to(dtype), b.to(dtype)
    found = batched_product(a, b, scale)
    assert found.shape == (batch, n, m)
    exact = scale * torch.einsum("bnk,bkm->bnm", a.double(), b.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14  # bfloat16 would be off by 4e-3
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance * abs(scale) * 10 * k)


def test_the_size_of_a_step_is_exact_too():
    torch.manual_seed(0)
    a, b = torch.randn(384, 64, 32), torch.randn(384, 32, 64)
    deviation = (batched_product(a, b).double() - a.double() @ b.double()).abs().max() / (a @ b).abs().max()
    assert deviation < 1e-6


@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_torchs_setting_is_what_it_was_also_after_an_error(before):
    matmul = torch.backends.mkldnn.matmul
    kept, matmul.fp32_precision = matmul.fp32_precision, before
    told = matmul.fp32_precision
    try:
        batched_product(torch.randn(2, 3, 4), torch.randn(2, 4, 5))
        assert matmul.fp32_precision == told
        with pytest.raises(RuntimeError):
            batched_product(torch.randn(2, 3, 4), torch.randn(2, 5, 5))
        assert matmul.fp32_precision == told
    finally:
        matmul.fp32_precision = kept


@pytest.mark.usefixtures("forget")
def test_a_processor_that_rounds_is_not_asked(monkeypatch):
    def rounding(a, b):
        return torch.matmul(a.bfloat16().float(), b.bfloat16().float())

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bmm", rounding)
        assert not onednn_is_exact(), "the trial does not see rounding"
        asked = []
        patch.setattr(module, "_onednn_allowed", lambda: asked.append(1))
        batched_product(torch.randn(2, 3, 4), torch.randn(2, 4, 5))
        assert not asked


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(("name", "value"), [("amx_tile", True), ("mkldnn", False), ("older", None)])
def test_matrix_units_and_builds_without_onednn_are_refused_unseen(monkeypatch, name, value):
    if name == "mkldnn":
        monkeypatch.setattr(type(torch.backends.mkldnn), "is_available", lambda _self: value)
    elif name == "older":  # a torch that can't tell
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: value})
    monkeypatch.setattr(module, "_onednn_allowed", lambda: pytest.fail("tried all the same"))
    assert not onednn_is_exact()
