"""An SAE inside a running language model: spliced in, looked at, edited. `pipeline.attach` is `attach.attach`."""
