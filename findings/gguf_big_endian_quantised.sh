#!/usr/bin/env bash
# gguf 0.19.0 on a little-endian machine (2026-12-01): its two ways to a big-endian file disagree on every tensor that is BF16 or
# in blocks.
#   GGUFWriter(endianess=BIG):           F32, F16 big-endian; BF16, Q8_0, Q4_0 the same bytes as in a little-endian file
#   gguf-convert-endian FILE big:        all big-endian, BF16 and the scales of the blocks too
# Such tensors are arrays of bytes in numpy, on which the writer's byteswap does nothing; it says nothing either. GGUFReader hands
# both out as they are: of the file that the converter made, dequantize gives other values, without an error.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 numpy==2.4.6
cat >"$folder/write.py" <<'PY'
import sys

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType


def write(path, order):
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    values = np.linspace(-3, 3, 64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("F32", values)
    writer.add_tensor("F16", values.astype(np.float16))
    for kind in (TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0):
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write(f"{sys.argv[1]}/little.gguf", gguf.GGUFEndian.LITTLE)
write(f"{sys.argv[1]}/converted.gguf", gguf.GGUFEndian.LITTLE)
write(f"{sys.argv[1]}/written.gguf", gguf.GGUFEndian.BIG)
PY
"$folder/venv/bin/python" "$folder/write.py" "$folder"
echo YES | "$folder/venv/bin/gguf-convert-endian" "$folder/converted.gguf" big >"$folder/log" 2>&1 || {
  cat "$folder/log"
  exit 1
}
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import gguf
import numpy as np

readers = {name: gguf.GGUFReader(f"{sys.argv[1]}/{name}.gguf") for name in ("little", "written", "converted")}
held = readers["written"].endianess == readers["converted"].endianess == gguf.GGUFEndian.BIG
for little, written, converted in zip(*(reader.tensors for reader in readers.values()), strict=True):
    stays = written.data.tobytes() == little.data.tobytes()
    agree = written.data.tobytes() == converted.data.tobytes()
    line = f"{little.name}: the writer's bytes are {'little' if stays else 'big'}-endian, "
    line += f"{'' if agree else 'not '}the converter's"
    if little.data.dtype == np.uint8:
        values, others = (gguf.dequantize(x.data, x.tensor_type) for x in (little, converted))
        far = bool(np.abs(values - others).max() > 1)
        line += f"; dequantised from the converter's file: {'other values' if far else 'the same values'}"
        held &= stays and not agree and far
    else:
        held &= agree and not stays
    print(line)
raise SystemExit(0 if held else 1)
PY
