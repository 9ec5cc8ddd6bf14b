"""What DeepSeek-V4 and V4.1 share: parallel streams, windows with compressed entries, their stored layout."""
