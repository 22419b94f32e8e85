"""The face models: finding and embedding a face, and the networks of the checks. Imports photos and what lies below."""
