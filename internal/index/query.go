package index

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// ErrInvalidCursor says that a cursor does not belong to what is asked.
var ErrInvalidCursor = errors.New("the page token is not of this list")

// Entry is what is known of a stored artifact, but for the digest of its manifest.
type Entry struct {
	cache.Stored
	// UsedAt is when it was used last.
	UsedAt time.Time
	// Uses is how many times it was downloaded.
	Uses int64

	id int64
}

// Filter matches artifacts. What is zero, or nil, matches any.
type Filter struct {
	// Scopes are those that they are in one of.
	Scopes []artifact.Scope
	// PackageName and TaskName are in full.
	PackageName, TaskName string
	// KeyPrefix is how the key begins: hexadecimal digits, lower-case.
	KeyPrefix string
	// StoredAfter and UsedAfter are the least times; StoredBefore and UsedBefore are greater than any.
	StoredAfter, StoredBefore, UsedAfter, UsedBefore time.Time
	// MinSize and MaxSize are bytes as uploaded.
	MinSize int64
	MaxSize *int64
	// Pinned says whether it must be, or must not be.
	Pinned *bool
}

// condition is a part of a statement behind WHERE.
type condition struct {
	terms []string
	args  []any
}

func (c *condition) and(term string, args ...any) {
	c.terms = append(c.terms, term)
	c.args = append(c.args, args...)
}

// allScopes selects the names of all scopes, as they stand in rows.
const allScopes = "(SELECT '' UNION ALL SELECT name FROM scopes)"

// scopes says that the rows of a table are of some scopes, unless these are nil, and of none of others. The default one
// has most rows, so it is not what they are looked for by.
func (c *condition) scopes(table string, in, notIn []artifact.Scope) {
	if in != nil {
		plus := ""
		if slices.Contains(in, artifact.DefaultScope) {
			plus = "+" // which keeps SQLite from using an index for it
		}
		c.and(fmt.Sprintf("%s%s.scope IN (SELECT value FROM json_each(?))", plus, table), scopeNames(in))
	}
	if len(notIn) > 0 {
		c.and(fmt.Sprintf("%s.scope NOT IN (SELECT value FROM json_each(?))", table), scopeNames(notIn))
	}
}

// scopeNames returns the names of scopes, as they stand in rows, in a JSON array.
func scopeNames(scopes []artifact.Scope) string {
	names := make([]string, len(scopes))
	for i, scope := range scopes {
		names[i], _ = columns(artifact.Name{Scope: scope})
	}
	text, err := json.Marshal(names)
	if err != nil {
		panic(err) // it has only what can be marshalled
	}
	return string(text)
}

// columns returns what stands for the name of an artifact in its row.
func columns(name artifact.Name) (scope, key string) {
	if name.Scope != artifact.DefaultScope {
		scope = name.Scope.String()
	}
	return scope, name.Key.String()
}

func (c *condition) String() string {
	if len(c.terms) == 0 {
		return "TRUE"
	}
	return strings.Join(c.terms, " AND ")
}

func (f Filter) condition() *condition {
	c := &condition{}
	if f.KeyPrefix == "" {
		c.scopes("a", f.Scopes, nil)
	}
	// Tasks are few, so their artifacts are found by the index on them.
	if f.PackageName != "" {
		c.and("a.task_id IN (SELECT id FROM tasks WHERE package = ?)", f.PackageName)
	}
	if f.TaskName != "" {
		c.and("a.task_id IN (SELECT id FROM tasks WHERE task = ?)", f.TaskName)
	}
	if f.KeyPrefix != "" {
		c.and("a.key >= ? AND a.key < ?", f.KeyPrefix, f.KeyPrefix+"g") // which is behind the last digit
		if f.Scopes != nil {
			c.and("a.scope IN (SELECT value FROM json_each(?))", scopeNames(f.Scopes))
		} else { // in each of which an index has the keys in their order
			c.and("a.scope IN " + allScopes)
		}
	}
	for _, bound := range []struct {
		term string
		at   time.Time
	}{{"a.stored_at >= ?", f.StoredAfter}, {"a.stored_at < ?", f.StoredBefore}, {"a.used_at >= ?", f.UsedAfter}, {"a.used_at < ?", f.UsedBefore}} {
		if !bound.at.IsZero() {
			c.and(bound.term, bound.at.UnixNano())
		}
	}
	if f.MinSize > 0 {
		c.and("a.size >= ?", f.MinSize)
	}
	if f.MaxSize != nil {
		c.and("a.size <= ?", *f.MaxSize)
	}
	if f.Pinned != nil {
		c.and("a.pinned = ?", *f.Pinned)
	}
	return c
}

// Order is what a list is ordered by.
type Order string

// The orders. Artifacts that are equal by one are in an order that stays the same.
const (
	ByStoredAt Order = "stored_at"
	ByUsedAt   Order = "used_at"
	BySize     Order = "size"
	ByKey      Order = "key" // by the scope before it, the default one first
)

// Query asks for a part of a list.
type Query struct {
	Filter     Filter
	Order      Order // ByStoredAt if it is empty
	Descending bool
	// Limit is the most entries.
	Limit int
	// After is the cursor that List returned with the entries before; empty for the first ones.
	After string
}

// cursor is a place in a list.
type cursor struct {
	Query string `json:"q"` // what the list is: see fingerprint
	Value any    `json:"v"` // of the last entry, by the order
	ID    int64  `json:"i"`
}

// fingerprint is the same for all parts of one list.
func (q Query) fingerprint() string {
	q.Limit, q.After = 0, ""
	text, err := json.Marshal(q)
	if err != nil {
		panic(err) // it has only what can be marshalled
	}
	sum := sha256.Sum256(text)
	return base64.RawURLEncoding.EncodeToString(sum[:6])
}

// value is what an entry is ordered by.
func (q Query) value(e Entry) any {
	switch q.Order {
	case ByUsedAt:
		return e.UsedAt.UnixNano()
	case BySize:
		return e.Size
	case ByKey:
		scope, key := columns(e.Name())
		return scope + "/" + key
	default:
		return e.StoredAt.UnixNano()
	}
}

const entryColumns = `a.id, a.scope, a.key, a.hash, a.size, a.uncompressed_size, a.files, t.package, t.task, a.command, a.created_at, a.stored_at,
	a.used_at, a.uses, a.disk_size, a.pinned FROM artifacts a JOIN tasks t ON t.id = a.task_id`

// freshen writes what was told so far, so that who did something sees it. If that can't be, what is known
// is as old as that.
func (x *Index) freshen(ctx context.Context) {
	if err := x.Flush(ctx); err != nil && ctx.Err() == nil {
		x.config.Log.Warn("the answer is not the newest, since the index can't be written", "error", err)
	}
}

// maxTextSize is how many bytes the names and commands of a page of a list have at most, unless it is a single
// entry. Clients chose them, and a page with the longest would have a hundred times as many.
const maxTextSize = 1 << 20

// List returns the next entries of a list and, if there may be more, the cursor for them. An error wraps
// ErrInvalidCursor if the cursor is of another list.
func (x *Index) List(ctx context.Context, q Query) (entries []Entry, next string, err error) {
	if q.Order == "" {
		q.Order = ByStoredAt
	}
	direction, beyond := "ASC", ">"
	if q.Descending {
		direction, beyond = "DESC", "<"
	}
	x.freshen(ctx)
	c := q.Filter.condition()
	first, second := "a."+string(q.Order), "a.id"
	if q.Order == ByKey {
		first, second = "a.scope", "a.key"
	}
	if q.After != "" {
		after, err := q.parse(q.After)
		if err != nil {
			return nil, "", err
		}
		var last any = after.ID
		if text, isText := after.Value.(string); isText {
			scope, key, _ := strings.Cut(text, "/")
			after.Value, last = scope, key
		}
		c.and(fmt.Sprintf("(%s, %s) %s (?, ?)", first, second, beyond), after.Value, last)
	}
	text := 0 // bytes
	query := fmt.Sprintf("SELECT %s WHERE %s ORDER BY %s %s, %s %[4]s LIMIT ?", entryColumns, c, first, direction, second)
	for e, err := range x.entries(ctx, query, append(c.args, q.Limit+1)...) {
		if err != nil {
			return nil, "", err
		}
		entries = append(entries, e)
		if text += len(e.PackageName) + len(e.TaskName) + len(e.Command); text > maxTextSize && len(entries) > 1 {
			break
		}
	}
	if len(entries) > q.Limit || text > maxTextSize && len(entries) > 1 {
		entries = entries[:len(entries)-1]
		last := entries[len(entries)-1]
		text, err := json.Marshal(cursor{q.fingerprint(), q.value(last), last.id})
		if err != nil {
			return nil, "", err
		}
		next = base64.RawURLEncoding.EncodeToString(text)
	}
	return entries, next, nil
}

// Copies returns what is known of the artifacts of a key, in all scopes that have one.
func (x *Index) Copies(ctx context.Context, key artifact.Key) (copies []Entry, err error) {
	x.freshen(ctx)
	for e, err := range x.entries(ctx, "SELECT "+entryColumns+" WHERE a.scope IN "+allScopes+" AND a.key = ? ORDER BY a.scope", key.String()) {
		if err != nil {
			return nil, err
		}
		copies = append(copies, e)
	}
	return copies, nil
}

func (q Query) parse(text string) (cursor, error) {
	var c cursor
	plain, err := base64.RawURLEncoding.DecodeString(text)
	if err == nil {
		decoder := json.NewDecoder(strings.NewReader(string(plain)))
		decoder.UseNumber() // or a time in nanoseconds would be rounded
		err = decoder.Decode(&c)
	}
	if err != nil || c.Query != q.fingerprint() {
		return c, ErrInvalidCursor
	}
	number, isNumber := c.Value.(json.Number)
	switch {
	case isNumber && q.Order != ByKey:
		c.Value, err = number.Int64()
	case isNumber:
		err = ErrInvalidCursor
	default:
		if _, isText := c.Value.(string); !isText || q.Order != ByKey {
			err = ErrInvalidCursor
		}
	}
	if err != nil {
		return c, ErrInvalidCursor
	}
	return c, nil
}

// entries yields what a query returns.
func (x *Index) entries(ctx context.Context, query string, args ...any) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		err := x.rows(ctx, query, args, func(scan func(...any) error) (bool, error) {
			e, err := scanEntry(scan)
			return err == nil && yield(e, nil), err
		})
		if err != nil {
			yield(Entry{}, err)
		}
	}
}

func scanEntry(scan func(...any) error) (Entry, error) {
	var e Entry
	var scope, key string
	var hash []byte
	var created, stored, used int64
	if err := scan(&e.id, &scope, &key, &hash, &e.Size, &e.UncompressedSize, &e.FileCount, &e.PackageName, &e.TaskName, &e.Command, &created,
		&stored, &used, &e.Uses, &e.DiskSize, &e.Pinned); err != nil {
		return e, err
	}
	var err error
	if e.Key, err = artifact.ParseKey(key); err != nil {
		return e, err
	}
	if e.Scope, err = scopeOf(scope); err != nil {
		return e, err
	}
	copy(e.Hash[:], hash)
	if e.Verified() {
		e.CreatedAt = time.Unix(created, 0).UTC()
	}
	e.StoredAt, e.UsedAt = time.Unix(0, stored), time.Unix(0, used)
	return e, nil
}

// scopeOf returns the scope that stands in a row.
func scopeOf(name string) (artifact.Scope, error) {
	if name == "" {
		return artifact.DefaultScope, nil
	}
	return artifact.ParseScope(name)
}

// rows calls each with the rows that a query returns, until it returns false or an error. An error of the
// database wraps ErrUnavailable.
func (x *Index) rows(ctx context.Context, query string, args []any, each func(scan func(...any) error) (bool, error)) error {
	x.db.RLock()
	defer x.db.RUnlock()
	if x.reader == nil {
		return errClosed
	}
	rows, err := x.reader.QueryContext(ctx, query, args...)
	if err != nil {
		return x.unavailable(ctx, err)
	}
	defer rows.Close()
	for rows.Next() {
		more, err := each(rows.Scan)
		if err != nil {
			return x.unavailable(ctx, err)
		}
		if !more {
			return nil
		}
	}
	return x.unavailable(ctx, rows.Err())
}

// unavailable returns what callers are told of an error of the database. One that is damaged is found out
// when the next batch is written.
func (x *Index) unavailable(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil {
		return errors.Join(ctx.Err(), err)
	}
	if damaged(err) {
		x.mu.Lock()
		x.damage = err
		x.mu.Unlock()
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// row is what a reconciliation compares.
type row struct {
	file     cache.File
	verified bool
}

// files returns the rows of the keys in a scope that begin with prefix.
func (x *Index) files(ctx context.Context, scope artifact.Scope, prefix string, rest *rest) (map[artifact.Key]row, error) {
	found := map[artifact.Key]row{}
	name, _ := columns(artifact.Name{Scope: scope})
	err := x.rows(ctx, "SELECT key, size, stored_at, disk_size, hash IS NOT NULL FROM artifacts WHERE scope = ? AND key >= ? AND key < ?",
		[]any{name, prefix, prefix + "g"}, func(scan func(...any) error) (bool, error) {
			var key string
			var r row
			if err := scan(&key, &r.file.Size, &r.file.StoredAt, &r.file.DiskSize, &r.verified); err != nil {
				return false, err
			}
			var err error
			r.file.Key, err = artifact.ParseKey(key)
			found[r.file.Key] = r
			return true, errors.Join(err, rest.after(1))
		})
	return found, err
}
