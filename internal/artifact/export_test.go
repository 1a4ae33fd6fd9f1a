package artifact

// TakeProcessors leaves verifications no processor until it is given back.
func (v *Verifier) TakeProcessors() (giveBack func()) {
	for range cap(v.capacity.processors) {
		v.capacity.processors <- struct{}{}
	}
	return func() {
		for range cap(v.capacity.processors) {
			<-v.capacity.processors
		}
	}
}
