"""Colour maps, figures, the HTML report, and the viser scene: what notebooks, app and viewer share."""
