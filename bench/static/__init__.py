"""What compiled code says, with no GPU: registers, spills, instructions of all that ships."""
