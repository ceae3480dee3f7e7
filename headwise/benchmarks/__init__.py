"""The field's benchmarks, read from their official files where they lie: questions, prompt and rule of each."""
