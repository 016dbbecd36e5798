"""NVIDIA's torch, as far as the Dockerfile's asserts look."""

__version__ = "2.10.0a0+b558c986e8.nv25.11"


class version:
    cuda = "13.0"


bfloat16 = int32 = None


class Tensor:
    def __init__(self, *shape, **_):
        self.shape = shape


ones = empty = Tensor


class ops:
    class aten:
        def _flash_attention_forward(query, *_, scale):
            return (query,)


class nn:
    class Linear:
        def __init__(self, inside, outside):
            self.outside = outside

    class Sequential:
        def __init__(self, *layers):
            self.layers = layers

        def __call__(self, batch):
            return Tensor(batch.shape[0], self.layers[-1].outside)

        def named_parameters(self):
            return []
