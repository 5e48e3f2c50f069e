"""The list of a model's tensors against the model itself."""

import pytest
import torch
from packed_models import CONFIG, VARIANTS

from bitnet.files.packed import packed_tensors
from bitnet.files.packed_layout import expected_tensors
from bitnet.files.source import TrainedSource
from bitnet.files.tensors import dense_shapes, is_embedding, is_projection, projection_shape, projections
from bitnet.layers import Embedding, RMSNorm
from bitnet.model import Transformer


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_model(variant: str) -> None:
    config = CONFIG.replace(**VARIANTS[variant])
    model = Transformer(config)
    listed = dense_shapes(config) | {f"{name}.weight": projection_shape(config, name) for name in projections(config)}
    assert listed == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in listed:
        module = model.get_submodule(name.removesuffix(".weight"))
        assert is_embedding(name) == isinstance(module, Embedding)
        assert is_projection(name) == isinstance(module, torch.nn.Linear)
        assert isinstance(module, RMSNorm) or is_embedding(name) or is_projection(name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_what_is_expected(variant: str, seed: int) -> None:
    model = Transformer(CONFIG.replace(**VARIANTS[variant]))
    model.init_weights(seed)
    written = dict(packed_tensors(TrainedSource(model, None, {})))
    expected = expected_tensors(model.config)
    assert set(written) == set(expected)
    for name, (shape, dtypes) in expected.items():
        assert tuple(written[name].shape) == shape
        assert written[name].dtype in dtypes
