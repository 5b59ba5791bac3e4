"""Pictures in and out, embedded samples, and files that are whole or absent."""

from l2m_viz.data.files import (
    Saved as Saved,
    atomic_write as atomic_write,
    load_npz as load_npz,
    remove_file as remove_file,
    save_npz as save_npz,
    write_text as write_text,
)
from l2m_viz.data.images import (
    cut_to as cut_to,
    fit_long_side as fit_long_side,
    read_image as read_image,
    resize_image as resize_image,
    to_uint8 as to_uint8,
    write_image as write_image,
)
from l2m_viz.data.samples import (
    Sample as Sample,
    list_samples as list_samples,
    load_sample as load_sample,
)
