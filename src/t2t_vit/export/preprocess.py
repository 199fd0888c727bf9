"""Put resizing and cropping in front of an ONNX graph, with the pixels that Pillow and timm's transform give.

onnxruntime's antialiased cubic Resize of uint8 is Pillow's algorithm, in the same fixed-point numbers.
"""

from typing import Any

from ..data import Preprocessing
from ..settings import UsageError

INTERPOLATIONS = {'bicubic': ('cubic', -0.5), 'bilinear': ('linear', -0.75)}


def prepend_preprocessing(proto: Any, preprocessing: Preprocessing) -> Any:
    """Return a graph that takes one uint8 image of any size, (1, H, W, C), resizes it and crops its middle.

    Args:
        proto: An onnx.ModelProto whose input `images` is uint8, (1, h, w, C).
        preprocessing: The model's.

    Raises:
        UsageError: if the preprocessing is none that ONNX has.
    """
    import onnx

    height, width = preprocessing.size
    mode = preprocessing.interpolation
    if mode not in INTERPOLATIONS or preprocessing.crop_mode not in ('center', 'squash'):
        raise UsageError(
            f'--pixels image has the interpolations {", ".join(INTERPOLATIONS)} and the crop modes center and squash, '
            f'not {mode} and {preprocessing.crop_mode}: use --pixels uint8-nhwc'
        )
    kind, coefficient = INTERPOLATIONS[mode]
    scaled = [int(side / preprocessing.crop_pct) for side in (height, width)]
    if preprocessing.crop_mode == 'squash':
        sizes = f'resized = Constant<value_ints = [{scaled[0]}, {scaled[1]}]>()'
    elif height == width:  # the shorter side becomes scaled[0]; the longer one is rounded down
        sizes = f"""shorter = ReduceMin<keepdims = 1>(sides)
           target = Constant<value_ints = [{scaled[0]}]>()
           times = Mul(sides, target)
           resized = Div(times, shorter)"""
    else:
        raise UsageError('--pixels image crops squares, or squashes (crop_mode): use --pixels uint8-nhwc')
    version = next(entry.version for entry in proto.opset_import if not entry.domain)
    channels = preprocessing.channels
    text = f'''<ir_version: {proto.ir_version}, opset_import: ["" : {version}]>
    preprocess (uint8[1, H, W, {channels}] image) => (uint8[1, {height}, {width}, {channels}] cropped) {{
           two = Constant<value_ints = [2]>()
           axes = Constant<value_ints = [2, 3]>()
           size = Constant<value_ints = [{height}, {width}]>()
           first = Transpose<perm = [0, 3, 1, 2]>(image)
           sides = Shape<start = 2, end = 4>(first)
           {sizes}
           scaled = Resize<mode = "{kind}", antialias = 1, exclude_outside = 1, cubic_coeff_a = {coefficient},
                           axes = [2, 3], coordinate_transformation_mode = "half_pixel">(first, , , resized)
           spare = Sub(resized, size)
           half = Div(spare, two)
           rest = Mod(spare, two)
           odd = Mod(half, two)
           up = Mul(rest, odd)
           corner = Add(half, up)
           end = Add(corner, size)
           part = Slice(scaled, corner, end, axes)
           cropped = Transpose<perm = [0, 2, 3, 1]>(part)
    }}'''  # an odd spare is halved as Python's round does, to the even number
    front = onnx.parser.parse_model(text)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    merged = onnx.compose.merge_models(front, proto, io_map=[('cropped', 'images')])
    merged.graph.input[0].name = 'images'  # a name that the merged graph has become free of
    for node in merged.graph.node:
        node.input[:] = ['images' if name == 'image' else name for name in node.input]
    return merged
