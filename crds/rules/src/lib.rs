//! Pure decisions: validate, plan, govern, health, supervise, status
