"""Tests of the container image that the environment variable IMAGE names; `make image-test`."""
