package auth

// Watch returns what Run does at each tick.
func (a *Authenticator) Watch() (look func()) {
	w := &watch{a: a}
	return w.look
}
