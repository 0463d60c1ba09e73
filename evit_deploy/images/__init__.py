"""Images as models see them: decoded, resized, normalised, and handed out in batches."""
