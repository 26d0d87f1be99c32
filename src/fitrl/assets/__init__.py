"""Files bundled with the package: a tiny pre-trained policy and the script that makes it."""
