"""Tensors of every format and of odd shapes, and how they are compared."""

import torch

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
SHAPES = {"matrix": (5, 7), "one_row": (1, 3), "one_column": (4, 1), "vector": (6,), "scalar": (), "empty": (0, 3)}


def draw(dtype, shape, generator):
    """A tensor of random bits, so NaN with payloads, infinities and negative zeros are among the values."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def draw_all():
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype}.{shape_name}": draw(dtype, shape, generator)
        for dtype in DTYPES
        for shape_name, shape in SHAPES.items()
    }


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist()
