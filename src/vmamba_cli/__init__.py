"""The `vmamba` command. Each verb is a file that imports the library when it runs: `--help` is instant."""
