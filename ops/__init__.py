"""Operations that torch has too, done with less work; `roberta` and `lora` both use them. Knows torch only."""
