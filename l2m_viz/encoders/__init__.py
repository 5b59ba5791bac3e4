"""Encoders of images into feature grids, and the PCA basis that shows features as colours."""

from l2m_viz.encoders.encoder import DenseSift as DenseSift, Encoder as Encoder, load_encoder as load_encoder
from l2m_viz.encoders.pca import FeaturePCA as FeaturePCA
