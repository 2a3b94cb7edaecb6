"""The `vmamba` command. Each verb is a file that imports the library inside, so that `--help` is instant."""
