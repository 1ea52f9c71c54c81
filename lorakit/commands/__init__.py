"""One file a subcommand, named as it is typed: config in, one core call, result out, the next command as a hint."""
