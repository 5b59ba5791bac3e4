"""Evaluation is tested on the photos of the trainings."""

from tests.training.conftest import photos as photos
