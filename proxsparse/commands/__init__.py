"""The commands: each parses arguments, calls the library, prints and writes a record. Scripts only forward to them."""
