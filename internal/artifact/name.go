package artifact

// Name is what an artifact is known by: its key, in a scope. It can be compared, and be the key of a map.
type Name struct {
	Scope Scope
	Key   Key
}

// In returns the name of the artifact with the key in a scope.
func (k Key) In(scope Scope) Name { return Name{scope, k} }

// String returns the digits of the key, behind the scope and a slash unless that is the default one.
func (n Name) String() string {
	if n.Scope == DefaultScope {
		return n.Key.String()
	}
	return n.Scope.name + "/" + n.Key.String()
}

// Agreement says whether two artifacts of one key, as of a build that ran twice, hold the same files.
type Agreement string

const (
	// AgreementSame says that they do.
	AgreementSame Agreement = "same"
	// AgreementDifferent says that they do not: the build is not deterministic, or one of them was not made by it.
	AgreementDifferent Agreement = "different"
	// AgreementUnknown says that the digest of a manifest is not known.
	AgreementUnknown Agreement = "unknown"
)

// Agreement says whether two artifacts hold the same files.
func (i Info) Agreement(other Info) Agreement {
	none := Digest{}
	switch {
	case i.Hash != none && i.Hash == other.Hash:
		return AgreementSame
	case i.Manifest == none || other.Manifest == none:
		return AgreementUnknown
	case i.Manifest == other.Manifest:
		return AgreementSame
	default:
		return AgreementDifferent
	}
}
