"""A sample of benchmarks/foreign.py: architectures of transformers that showed what tracing can do to a model."""

import pytest
from foreign_checks import check
from foreign_models import transformers_models

MODELS = transformers_models()
SAMPLE = (
    "clip",  # projections that methods read
    "mamba2",  # weights of children that Python code reads
    "mixtral",  # experts
)


def test_architectures_are_many() -> None:
    assert len(MODELS) > 150


@pytest.mark.filterwarnings("ignore")  # of libraries and of torch about each other
@pytest.mark.parametrize("name", SAMPLE)
def test_architecture(name: str) -> None:
    model, inputs = MODELS[name]()
    found = check(lambda: model, inputs)
    assert {k: message for k, message in found.items() if message} == {}
