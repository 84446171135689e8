"""The text of Python's standard library, as sequences of bytes."""

import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

LENGTH = 64
# Folders that are not part of the library, differ between installations, or hold generated text.
LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__', 'encodings', 'idlelib', 'lib2to3'}
# Percentages of files in these splits; the others are for training.
SHARES = {'test': 5, 'validation': 5}


class PythonBytes(tfds.core.GeneratorBasedBuilder):
    """The .py files of the standard library of the Python that prepares it (PSF license), in sequences of 65 bytes.

    A network gets 64 of them and predicts the byte after each. A file is in one split, chosen by the hash of its path.
    The data set's metadata has the version of Python and a checksum of the text.
    """

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES: ClassVar[dict[str, str]] = {'1.0.0': 'First version.'}
    # The base class looks for a package beside this file to read metadata from; there is none.
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The text of Python's standard library, in sequences of bytes.",
            features=tfds.features.FeaturesDict({'tokens': tfds.features.Tensor(shape=(LENGTH + 1,), dtype=np.uint8)}),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        texts = read_texts(library_folder())
        digest = hashlib.sha256()
        for name, text in texts.items():
            digest.update(name.encode() + b'\0' + text + b'\0')
        metadata: Any = self.info.metadata
        metadata |= {
            'python': platform.python_version(),
            'files': len(texts),
            'bytes': sum(map(len, texts.values())),
            'sha256': digest.hexdigest(),
        }
        names = {split: [name for name in texts if find_split(name) == split] for split in ('train', *SHARES)}
        return {split: self._generate_examples([texts[name] for name in own]) for split, own in names.items()}

    def _generate_examples(self, texts: list[bytes]):
        number = 0
        for text in texts:
            for start in range(0, len(text) - LENGTH, LENGTH):
                yield number, {'tokens': np.frombuffer(text[start : start + LENGTH + 1], np.uint8)}
                number += 1


def library_folder() -> Path:
    """Returns the folder of this Python's standard library."""
    return Path(sysconfig.get_paths()['stdlib'])


def read_texts(root: Path) -> dict[str, bytes]:
    """Returns the text of every .py file below a folder by relative path; files that are not UTF-8 are left out."""
    texts = {}
    for file in sorted(root.rglob('*.py')):
        name = file.relative_to(root)
        text = b'' if LEFT_OUT & set(name.parts) else file.read_bytes()
        try:
            text.decode('utf-8')
        except UnicodeDecodeError:
            continue
        if len(text) > LENGTH:
            texts[name.as_posix()] = text
    return texts


def find_split(name: str) -> str:
    """Returns the split of a file, chosen by the hash of its path."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big') % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return 'train'
