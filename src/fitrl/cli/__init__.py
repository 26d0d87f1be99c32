"""Sub-commands of `fitrl`: each module has a `make_parser()` and a `main(arguments) -> exit status`."""
