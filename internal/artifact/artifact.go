// Package artifact knows what is stored: the form of an artifact, what makes it sound, and how to
// pack and extract one.
//
// An artifact is a Zstandard stream (RFC 8878), of one or several frames, of a tar archive (POSIX
// ustar or pax, or GNU) that holds
//
//	metadata.json    who made it, for which key: Metadata
//	manifest.json    {"files": {"<path>": "<sha-256>"}, "total_size": <bytes>}
//	outputs/<path>   the files
//
// A sound artifact keeps these rules, and a Verifier checks all of them in one pass over the bytes,
// in memory that is bounded by its Limits and not by the artifact:
//
//	stream    The stream decodes to its very end with nothing behind its last frame; the tar archive
//	          is well formed, its headers in the forms that readers of tar understand alike, ends with
//	          its two zero blocks, and only zeros follow them.
//	document  metadata.json and manifest.json are there exactly once, in any position, are valid
//	          UTF-8 JSON of the right shape without a member given twice; the version is 1.
//	key       cache_key_hash names the key that the artifact is stored under.
//	entry     Every other entry is a regular file below outputs/, once and listed, or a directory
//	          that contains one. Every listed file is there, every SHA-256 agrees, and the sizes add
//	          up to total_size.
//	path      Every path is safe to extract anywhere: relative, no "..", no empty or "." element, no
//	          NUL, no drive letter, and no file where another path needs a directory.
//	limit     Nothing is over the Limits, and what is over is refused when it crosses the limit.
//
// "\" and "/" are the same separator, since clients on Windows write one into the manifest and the
// other into the archive. Members of the two documents that are not named here are ignored, up to 1,000.
package artifact

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"
)

// version is the only version of the artifact form that there is.
const version = 1

// Names of the archive's fixed members.
const (
	metadataName = "metadata.json"
	manifestName = "manifest.json"
	outputsName  = "outputs"
)

// Metadata says which task made an artifact and for which key: the metadata.json.
type Metadata struct {
	// PackageName is the package whose task made the artifact.
	PackageName string
	// TaskName is the task that made the artifact.
	TaskName string
	// Command is the command that the task ran.
	Command string
	// CreatedAt is when the artifact was made, by the clock of the client that made it, in whole
	// seconds from 1970 to 9999.
	CreatedAt time.Time
}

// File is one file in an artifact.
type File struct {
	// Path is relative to outputs/, with "/" between its elements.
	Path string
	// Hash is the SHA-256 of the content.
	Hash Digest
	// Size is the number of bytes of the content.
	Size int64
}

// Contents is what a sound artifact holds.
type Contents struct {
	Metadata
	// Files are in ascending order of the bytes of their paths.
	Files []File
	// UncompressedSize is the number of bytes of the files together: the manifest's total_size.
	UncompressedSize int64
}

// Manifest returns a digest that is the same for artifacts that hold the same files: the SHA-256 over each
// file's own SHA-256, its path, and a zero byte, in ascending order of the bytes of the paths. It says nothing
// of how an archive is written, of the times in it or of the metadata, which differ from build to build.
func (c *Contents) Manifest() Digest {
	sum := sha256.New()
	for _, f := range c.Files {
		sum.Write(f.Hash[:])
		io.WriteString(sum, f.Path) // without a zero byte in it, as every safe path
		sum.Write([]byte{0})
	}
	return Digest(sum.Sum(nil))
}

// Info is what is known of an artifact without opening it.
type Info struct {
	// Scope is the scope that the artifact is stored in.
	Scope Scope
	// Key is the key that the artifact is stored under.
	Key Key
	// Hash is the SHA-256 of the artifact's bytes as they were uploaded.
	Hash Digest
	// Size is the number of those bytes.
	Size int64
	// Manifest is the digest of what the artifact holds: see Contents.Manifest. It is zero if that is not known,
	// of an artifact that was verified before there was this digest.
	Manifest Digest
	// UncompressedSize is the number of bytes of the artifact's files together.
	UncompressedSize int64
	// FileCount is the number of the artifact's files.
	FileCount int
	// Metadata is the artifact's own.
	Metadata
	// StoredAt is when the artifact was stored, by the store's clock. Zero before that.
	StoredAt time.Time
}

// Name returns what the artifact is known by.
func (i Info) Name() Name { return Name{i.Scope, i.Key} }

// Info returns what is known of the artifact that c was read from, made for key, with the hash and size of its
// bytes, before it is stored in a scope.
func (c *Contents) Info(key Key, hash Digest, size int64) Info {
	return Info{
		Key:              key,
		Hash:             hash,
		Size:             size,
		Manifest:         c.Manifest(),
		UncompressedSize: c.UncompressedSize,
		FileCount:        len(c.Files),
		Metadata:         c.Metadata,
	}
}

// Limits bound what a Verifier accepts, and so what memory and time one artifact can cost, and its
// Capacity what all of them can. Each of the limits must be positive.
type Limits struct {
	// UnpackedSize is the most bytes that the stream may decode to, the tar archive's own included.
	UnpackedSize int64
	// Window is the largest window that the stream may ask its decoder to keep, in bytes from
	// MinWindow to MaxWindow. RFC 8878 advises at least 8 MiB; it bounds the decoder's memory.
	Window int64
	// Files is the largest number of files, directories included.
	Files int
	// PathLength is the most bytes in a path below outputs/.
	PathLength int
	// MetadataSize is the most bytes in metadata.json.
	MetadataSize int64
	// ManifestSize is the most bytes in manifest.json, and in the names and pax headers of all
	// entries together.
	ManifestSize int64

	Capacity
}

// MinWindow and MaxWindow are the least and the largest Limits.Window.
const (
	MinWindow = zstd.MinWindowSize
	MaxWindow = zstd.MaxWindowSize
)

// DefaultLimits suit artifacts of up to 1 GiB. Verifying one takes at most some 120 MiB of memory
// with them, and usually some 5 MiB.
var DefaultLimits = Limits{
	UnpackedSize: 16 << 30,
	Window:       8 << 20,
	Files:        100_000,
	PathLength:   4096,
	MetadataSize: 64 << 10,
	ManifestSize: 32 << 20,
	Capacity:     Capacity{Memory: 512 << 20, Queue: 1000, QueueTimeout: 10 * time.Second},
}

// Rule is a rule of soundness, as the package comment numbers them.
type Rule string

// The rules of soundness.
const (
	RuleStream   Rule = "stream"
	RuleDocument Rule = "document"
	RuleKey      Rule = "key"
	RuleEntry    Rule = "entry"
	RulePath     Rule = "path"
	RuleLimit    Rule = "limit"
)

// ErrUnsound is wrapped by every UnsoundError.
var ErrUnsound = errors.New("artifact is not sound")

// UnsoundError is the first thing that was found wrong with an artifact.
type UnsoundError struct {
	// Rule is the rule that the artifact breaks.
	Rule Rule
	// Where is the part of the artifact that breaks it: a document, a quoted path, or the stream.
	Where string
	// What is wrong there, as the rest of a sentence that begins with Where.
	What string
}

func (e *UnsoundError) Error() string { return e.Where + " " + e.What }

// Unwrap returns ErrUnsound.
func (e *UnsoundError) Unwrap() error { return ErrUnsound }

// unsound returns an UnsoundError; an UnsoundError among the args is returned as it is, since it knows
// better what is wrong.
func unsound(rule Rule, where, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if inner, ok := errors.AsType[*UnsoundError](err); ok {
		return inner
	}
	return &UnsoundError{rule, where, err.Error()}
}
