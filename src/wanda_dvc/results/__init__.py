"""The results of a study: one reader, one table of measures, one comparison; the views loop over them."""
