"""The frozen base: made from float weights, stored once, measured."""
