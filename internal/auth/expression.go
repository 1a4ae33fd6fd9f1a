package auth

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/ext"
)

const (
	// maxExpression is how many characters an expression may have.
	maxExpression = 4096
	// maxCost is what one evaluation may cost, in CEL's own unit, about one operation. What callers put into their
	// claims can't make an expression cost more; it does not fit then.
	maxCost = 100_000
)

// certificateFields are what an expression sees of a client certificate, as certificate.
type certificateFields struct {
	Subject certificateName `cel:"subject"`
	Issuer  certificateName `cel:"issuer"`
	DNS     []string        `cel:"dns_names"`
	Emails  []string        `cel:"emails"`
	URIs    []string        `cel:"uris"`
	IPs     []string        `cel:"ips"`
	Serial  string          `cel:"serial"` // decimal digits
	SHA256  string          `cel:"sha256"` // of all of it, 64 lower-case hexadecimal digits
}

// certificateName is the name of the owner or the issuer of a certificate.
type certificateName struct {
	CommonName         string   `cel:"common_name"`
	Organization       []string `cel:"organization"`
	OrganizationalUnit []string `cel:"organizational_unit"`
}

func fieldsOf(c *x509.Certificate) certificateFields {
	digest := sha256.Sum256(c.Raw)
	fields := certificateFields{
		Subject: certificateName{c.Subject.CommonName, c.Subject.Organization, c.Subject.OrganizationalUnit},
		Issuer:  certificateName{c.Issuer.CommonName, c.Issuer.Organization, c.Issuer.OrganizationalUnit},
		DNS:     c.DNSNames,
		Emails:  c.EmailAddresses,
		SHA256:  hex.EncodeToString(digest[:]),
	}
	if c.SerialNumber != nil {
		fields.Serial = c.SerialNumber.String()
	}
	for _, uri := range c.URIs {
		fields.URIs = append(fields.URIs, uri.String())
	}
	for _, ip := range c.IPAddresses {
		fields.IPs = append(fields.IPs, ip.String())
	}
	return fields
}

// environments are where expressions are compiled: those of rules for claims, and those for certificates.
var environments = sync.OnceValues(func() (map[bool]*cel.Env, error) {
	claims, err := cel.NewEnv(ext.Strings(), cel.ParserExpressionSizeLimit(maxExpression), cel.Variable("claims", cel.MapType(cel.StringType, cel.DynType)))
	if err != nil {
		return nil, err
	}
	certificate, err := cel.NewEnv(
		ext.Strings(),
		cel.ParserExpressionSizeLimit(maxExpression),
		ext.NativeTypes(reflect.TypeFor[certificateFields](), ext.ParseStructTags(true)),
		cel.Variable("certificate", cel.ObjectType("auth.certificateFields")),
	)
	return map[bool]*cel.Env{false: claims, true: certificate}, err
})

// expression is a compiled one.
type expression struct{ program cel.Program }

// compileError says what is wrong in an expression, and in which of its lines, from 1.
type compileError struct {
	line int
	text string
}

// compile compiles an expression about certificates, or else about claims, whose value must have one of some types.
func compile(text string, certificate bool, want ...*cel.Type) (*expression, *compileError) {
	all, err := environments()
	if err != nil {
		return nil, &compileError{1, err.Error()}
	}
	env := all[certificate]
	ast, issues := env.Compile(text)
	if err := issues.Err(); err != nil {
		if list := issues.Errors(); len(list) > 0 {
			return nil, &compileError{max(list[0].Location.Line(), 1), strings.Join(strings.Fields(list[0].Message), " ")}
		}
		return nil, &compileError{1, err.Error()}
	}
	fits := false
	for _, t := range want {
		fits = fits || ast.OutputType().IsExactType(t)
	}
	if !fits {
		if want[0] == cel.BoolType {
			return nil, &compileError{1, fmt.Sprintf("it is %s and not true or false; compare it with something", cel.FormatCELType(ast.OutputType()))}
		}
		return nil, &compileError{1, fmt.Sprintf("it is %s and neither text nor a whole number", cel.FormatCELType(ast.OutputType()))}
	}
	program, err := env.Program(ast, cel.CostLimit(maxCost))
	if err != nil {
		return nil, &compileError{1, err.Error()}
	}
	return &expression{program}, nil
}

// variables are what the expressions of a rule see of an identity.
func (id Identity) variables() map[string]any {
	if id.Certificate != nil {
		return map[string]any{"certificate": fieldsOf(id.Certificate)}
	}
	return map[string]any{"claims": id.Claims}
}

// fits says whether the expression is true.
func (e *expression) fits(variables map[string]any) (bool, error) {
	value, _, err := e.program.Eval(variables)
	if err != nil {
		return false, err
	}
	return value == types.True, nil
}

// text returns the expression's value as text.
func (e *expression) text(variables map[string]any) (string, error) {
	value, _, err := e.program.Eval(variables)
	if err != nil {
		return "", err
	}
	switch v := value.Value().(type) {
	case string:
		return v, nil
	case int64:
		return strconv.FormatInt(v, 10), nil
	}
	return "", fmt.Errorf("its value is %s and neither text nor a whole number", value.Type().TypeName())
}

// template is text with expressions in braces.
type template struct {
	texts       []string // one more than expressions: text, expression, text, …
	expressions []*expression
}

// parseTemplate returns the template that text writes, or nil if there is no brace in it.
func parseTemplate(text string, certificate bool) (*template, error) {
	t := &template{}
	for {
		before, rest, found := strings.Cut(text, "{")
		if strings.Contains(before, "}") {
			return nil, errors.New("there is a } without a {")
		}
		t.texts = append(t.texts, before)
		if !found {
			break
		}
		inside, after, closed := strings.Cut(rest, "}")
		if !closed || strings.Contains(inside, "{") {
			return nil, errors.New("there is a { without a }; the expression between them must have no braces")
		}
		e, err := compile(inside, certificate, cel.StringType, cel.IntType, cel.DynType)
		if err != nil {
			return nil, fmt.Errorf("%q: %s", inside, err.text)
		}
		t.expressions = append(t.expressions, e)
		text = after
	}
	if len(t.expressions) == 0 {
		return nil, nil
	}
	return t, nil
}

// text returns the template with the values of its expressions.
func (t *template) text(variables map[string]any) (string, error) {
	text := t.texts[0]
	for i, e := range t.expressions {
		value, err := e.text(variables)
		if err != nil {
			return "", err
		}
		text += value + t.texts[i+1]
	}
	return text, nil
}
