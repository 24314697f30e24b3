"""What a person may ask about what was recorded: why a call was answered so, what memory changed, to be forgotten."""
